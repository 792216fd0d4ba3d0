"""A query and a document -> the prompt by which a reranker scores them.

A reranker that is a language model was trained on one form of prompt, and its scores mean nothing
with any other. The form is a chat template that shows the roles query and document, and maybe
system, which holds an instruction. The Qwen3 rerankers come without one, so theirs is written here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pyserve.errors import ConfigError
from pyserve.text.chat_template import ChatTemplate
from pyserve.text.guard import ChatPrompt
from pyserve.text.tokenizer import Tokenizer

QWEN3 = "qwen3"  # model_type in config.json
# From the model card. The messages are an instruction (optional, role system), a query and a
# document. Jinja removes a line break after a block and at the end, but not after an expression.
_QWEN3_SOURCE = """\
<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. \
Note that the answer can only be "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: {{ messages[0].content if messages[0].role == 'system' else \
'Given a web search query, retrieve relevant passages that answer the query' }}
<Query>: {{ messages[-2].content }}
<Document>: {{ messages[-1].content }}<|im_end|>
<|im_start|>assistant
<think>

</think>{{ '\\n\\n' }}"""
_BEGINNING = "<|im_start|>"
_shows_query = re.compile(r"""(['"])query\1""").search
_shows_document = re.compile(r"""(['"])document\1""").search


class ScoreTemplate:
    """How a query and a document are encoded for a reranker.

    written_beginning  a query that starts with this has been put into the model's form by the
                       client, and so has the document, so both are encoded as they are. "" if there
                       is no such form.
    """

    def __init__(
        self, template: ChatTemplate, tokenizer: Tokenizer, *, written_beginning: str = ""
    ) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._written_beginning = written_beginning

    @classmethod
    def find(
        cls, template: ChatTemplate, tokenizer: Tokenizer, *, model_type: str
    ) -> ScoreTemplate:
        """The prompt of a model: its own chat template if that shows queries and documents, else
        the one that is known for its `model_type`. Raises ConfigError if there is neither.
        """
        source = template.source
        if source is not None and _shows_query(source) and _shows_document(source):
            return cls(template, tokenizer)
        if model_type == QWEN3:
            own = template.with_source(_QWEN3_SOURCE, origin="the template of Qwen3-Reranker")
            return cls(own, tokenizer, written_beginning=_BEGINNING)
        raise ConfigError(
            "how this reranker wants to be shown a query and a document is not known: its chat "
            "template must show the roles 'query' and 'document'; --chat-template gives another"
        )

    def encode(self, query: str, document: str, instruction: str | None) -> list[int]:
        """Token ids of the prompt. Raises InvalidRequestError and ChatTemplateError."""
        if self._written_beginning and query.startswith(self._written_beginning):
            return self._tokenizer.encode(query + document, add_special_tokens=False, param="query")
        messages: list[Mapping[str, str]] = []
        if instruction is not None:
            messages.append({"role": "system", "content": instruction})
        messages.append({"role": "query", "content": query})
        messages.append({"role": "document", "content": document})
        prompt: ChatPrompt = self._template.render_as_given(messages)
        return self._tokenizer.encode_chat(prompt)
