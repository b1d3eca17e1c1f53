"""Import path for users of the models in plain PyTorch: `from albert_fast import reference`. The code is in `models/reference/`."""

from .models.reference import ALBERTForMaskedLM as ALBERTForMaskedLM
from .models.reference import ALBERTForMultipleChoice as ALBERTForMultipleChoice
from .models.reference import ALBERTForPreTraining as ALBERTForPreTraining
from .models.reference import ALBERTForQuestionAnswering as ALBERTForQuestionAnswering
from .models.reference import ALBERTForSequenceClassification as ALBERTForSequenceClassification
from .models.reference import ALBERTForTokenClassification as ALBERTForTokenClassification
from .models.reference import ALBERTModel as ALBERTModel
