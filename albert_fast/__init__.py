"""albert_fast: ALBERT and BERT's family with custom kernels, drop-ins for the eager models with the same numbers out.

    from albert_fast import AutoModel
    model = AutoModel.from_pretrained("path/to/checkpoint")
    out = model(input_ids, attention_mask)

Names are loaded on first use, so that `import albert_fast` costs little more than `import torch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .runtime.version import __version__

if TYPE_CHECKING:
    from .accelerate.api import accelerate as accelerate
    from .accelerate.api import restore as restore
    from .accelerate.patching import patch_transformers as patch_transformers
    from .accelerate.patching import unpatch_transformers as unpatch_transformers
    from .inspect.explain import explain as explain
    from .layers.packing import aligned_representation as aligned_representation
    from .layers.wanted import WantedTokens as WantedTokens
    from .models.albert import ALBERTModel as ALBERTModel
    from .models.auto import AutoModel as AutoModel
    from .models.auto import AutoModelForMaskedLM as AutoModelForMaskedLM
    from .models.auto import AutoModelForMultipleChoice as AutoModelForMultipleChoice
    from .models.auto import AutoModelForPreTraining as AutoModelForPreTraining
    from .models.auto import AutoModelForQuestionAnswering as AutoModelForQuestionAnswering
    from .models.auto import AutoModelForSequenceClassification as AutoModelForSequenceClassification
    from .models.auto import AutoModelForTokenClassification as AutoModelForTokenClassification
    from .models.bert import BERTConfig as BERTConfig
    from .models.bert import BERTForMaskedLM as BERTForMaskedLM
    from .models.bert import BERTForMultipleChoice as BERTForMultipleChoice
    from .models.bert import BERTForPreTraining as BERTForPreTraining
    from .models.bert import BERTForQuestionAnswering as BERTForQuestionAnswering
    from .models.bert import BERTForSequenceClassification as BERTForSequenceClassification
    from .models.bert import BERTForTokenClassification as BERTForTokenClassification
    from .models.bert import BERTModel as BERTModel
    from .models.config import ALBERTConfig as ALBERTConfig
    from .models.distilbert import DistilBERTConfig as DistilBERTConfig
    from .models.distilbert import DistilBERTForMaskedLM as DistilBERTForMaskedLM
    from .models.distilbert import DistilBERTForMultipleChoice as DistilBERTForMultipleChoice
    from .models.distilbert import DistilBERTForQuestionAnswering as DistilBERTForQuestionAnswering
    from .models.distilbert import DistilBERTForSequenceClassification as DistilBERTForSequenceClassification
    from .models.distilbert import DistilBERTForTokenClassification as DistilBERTForTokenClassification
    from .models.distilbert import DistilBERTModel as DistilBERTModel
    from .models.electra import ELECTRAConfig as ELECTRAConfig
    from .models.electra import ELECTRAForMaskedLM as ELECTRAForMaskedLM
    from .models.electra import ELECTRAForMultipleChoice as ELECTRAForMultipleChoice
    from .models.electra import ELECTRAForPreTraining as ELECTRAForPreTraining
    from .models.electra import ELECTRAForQuestionAnswering as ELECTRAForQuestionAnswering
    from .models.electra import ELECTRAForSequenceClassification as ELECTRAForSequenceClassification
    from .models.electra import ELECTRAForTokenClassification as ELECTRAForTokenClassification
    from .models.electra import ELECTRAModel as ELECTRAModel
    from .models.heads import ALBERTForMaskedLM as ALBERTForMaskedLM
    from .models.heads import ALBERTForMultipleChoice as ALBERTForMultipleChoice
    from .models.heads import ALBERTForPreTraining as ALBERTForPreTraining
    from .models.heads import ALBERTForQuestionAnswering as ALBERTForQuestionAnswering
    from .models.heads import ALBERTForSequenceClassification as ALBERTForSequenceClassification
    from .models.heads import ALBERTForTokenClassification as ALBERTForTokenClassification
    from .models.roberta import RoBERTaConfig as RoBERTaConfig
    from .models.roberta import RoBERTaForMaskedLM as RoBERTaForMaskedLM
    from .models.roberta import RoBERTaForMultipleChoice as RoBERTaForMultipleChoice
    from .models.roberta import RoBERTaForQuestionAnswering as RoBERTaForQuestionAnswering
    from .models.roberta import RoBERTaForSequenceClassification as RoBERTaForSequenceClassification
    from .models.roberta import RoBERTaForTokenClassification as RoBERTaForTokenClassification
    from .models.roberta import RoBERTaModel as RoBERTaModel
    from .models.seq2seq import ALBERTForConditionalGeneration as ALBERTForConditionalGeneration
    from .models.seq2seq_config import ALBERTSeq2SeqConfig as ALBERTSeq2SeqConfig
    from .ops import synchronize as synchronize
    from .tasks.answer import QuestionAnswerer as QuestionAnswerer
    from .tasks.choose import TextChooser as TextChooser
    from .tasks.embed import TextEncoder as TextEncoder
    from .tasks.score import TextScorer as TextScorer
    from .tasks.tag import TextTagger as TextTagger
    from .tasks.translate import Translator as Translator
    from .text.tokenizer import load_tokenizer as load_tokenizer

_HOME = {
    "accelerate": "accelerate.api",
    "restore": "accelerate.api",
    "patch_transformers": "accelerate.patching",
    "unpatch_transformers": "accelerate.patching",
    "ALBERTConfig": "models.config",
    "ALBERTModel": "models.albert",
    "ALBERTForMaskedLM": "models.heads",
    "ALBERTForPreTraining": "models.heads",
    "ALBERTForSequenceClassification": "models.heads",
    "ALBERTForTokenClassification": "models.heads",
    "ALBERTForQuestionAnswering": "models.heads",
    "ALBERTForMultipleChoice": "models.heads",
    "ALBERTForConditionalGeneration": "models.seq2seq",
    "ALBERTSeq2SeqConfig": "models.seq2seq_config",
    "BERTConfig": "models.bert",
    "BERTModel": "models.bert",
    "BERTForMaskedLM": "models.bert",
    "BERTForPreTraining": "models.bert",
    "BERTForSequenceClassification": "models.bert",
    "BERTForTokenClassification": "models.bert",
    "BERTForQuestionAnswering": "models.bert",
    "BERTForMultipleChoice": "models.bert",
    "RoBERTaConfig": "models.roberta",
    "RoBERTaModel": "models.roberta",
    "RoBERTaForMaskedLM": "models.roberta",
    "RoBERTaForSequenceClassification": "models.roberta",
    "RoBERTaForTokenClassification": "models.roberta",
    "RoBERTaForQuestionAnswering": "models.roberta",
    "RoBERTaForMultipleChoice": "models.roberta",
    "DistilBERTConfig": "models.distilbert",
    "DistilBERTModel": "models.distilbert",
    "DistilBERTForMaskedLM": "models.distilbert",
    "DistilBERTForSequenceClassification": "models.distilbert",
    "DistilBERTForTokenClassification": "models.distilbert",
    "DistilBERTForQuestionAnswering": "models.distilbert",
    "DistilBERTForMultipleChoice": "models.distilbert",
    "ELECTRAConfig": "models.electra",
    "ELECTRAModel": "models.electra",
    "ELECTRAForMaskedLM": "models.electra",
    "ELECTRAForPreTraining": "models.electra",
    "ELECTRAForSequenceClassification": "models.electra",
    "ELECTRAForTokenClassification": "models.electra",
    "ELECTRAForQuestionAnswering": "models.electra",
    "ELECTRAForMultipleChoice": "models.electra",
    "AutoModel": "models.auto",
    "AutoModelForMaskedLM": "models.auto",
    "AutoModelForPreTraining": "models.auto",
    "AutoModelForSequenceClassification": "models.auto",
    "AutoModelForTokenClassification": "models.auto",
    "AutoModelForQuestionAnswering": "models.auto",
    "AutoModelForMultipleChoice": "models.auto",
    "aligned_representation": "layers.packing",
    "WantedTokens": "layers.wanted",
    "QuestionAnswerer": "tasks.answer",
    "TextChooser": "tasks.choose",
    "TextEncoder": "tasks.embed",
    "TextScorer": "tasks.score",
    "Translator": "tasks.translate",
    "TextTagger": "tasks.tag",
    "explain": "inspect.explain",
    "load_tokenizer": "text.tokenizer",
    "synchronize": "ops",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
