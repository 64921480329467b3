"""The names of transformers that mxcompile uses, from where they are defined.

Its own `__init__.py` imports every model: types would be checked in twice the time.
"""

from transformers.configuration_utils import PreTrainedConfig as PreTrainedConfig
from transformers.generation import CompileConfig as CompileConfig
from transformers.generation import GenerationConfig as GenerationConfig
from transformers.generation import GenerationMixin as GenerationMixin
from transformers.generation import TextStreamer as TextStreamer
from transformers.masking_utils import AttentionMaskInterface as AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface as AttentionInterface
from transformers.modeling_utils import PreTrainedModel as PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM as AutoModelForCausalLM
from transformers.models.auto.processing_auto import AutoProcessor as AutoProcessor
from transformers.models.auto.tokenization_auto import AutoTokenizer as AutoTokenizer
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast as PreTrainedTokenizerFast

__version__: str
