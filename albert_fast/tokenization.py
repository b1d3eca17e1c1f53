"""Import path for users of the tokenizer: `from albert_fast.tokenization import load_tokenizer`. The code is in `text/`."""

from .text.tokenizer import Tokenizer as Tokenizer
from .text.tokenizer import load_tokenizer as load_tokenizer
from .text.tokenizer import train_tokenizer as train_tokenizer
