"""All interfaces there are.

Owns: the list.
Does not know: what is in them.
"""

from jaxinfer.serve.interfaces.anthropic import COUNT_LOOKUP, MESSAGE_INTERFACE
from jaxinfer.serve.interfaces.chat import CHAT, chat_interface
from jaxinfer.serve.interfaces.megatron import MEGATRON_INTERFACES
from jaxinfer.serve.interfaces.responses import RESPONSE_INTERFACE
from jaxinfer.serve.interfaces.text import TEXT, text_interface
from jaxinfer.serve.interfaces.tokens import LOOKUPS as TOKEN_LOOKUPS

INTERFACES = (
    chat_interface(CHAT),
    text_interface(TEXT),
    RESPONSE_INTERFACE,
    MESSAGE_INTERFACE,
    *MEGATRON_INTERFACES,
)
LOOKUPS = (COUNT_LOOKUP, *TOKEN_LOOKUPS)
