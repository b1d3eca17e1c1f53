"""ALBERT and its task heads in plain PyTorch: what every kernel and every fast model is compared with."""

from .albert import ALBERTModel as ALBERTModel
from .heads import ALBERTForMaskedLM as ALBERTForMaskedLM
from .heads import ALBERTForMultipleChoice as ALBERTForMultipleChoice
from .heads import ALBERTForPreTraining as ALBERTForPreTraining
from .heads import ALBERTForQuestionAnswering as ALBERTForQuestionAnswering
from .heads import ALBERTForSequenceClassification as ALBERTForSequenceClassification
from .heads import ALBERTForTokenClassification as ALBERTForTokenClassification
