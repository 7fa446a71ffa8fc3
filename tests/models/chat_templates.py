"""Chat templates as they are met in the wild, and tokenizers of several makes to use them with."""

from __future__ import annotations

import json
from typing import Any

from corrigible.models.renderer import CHATML

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# Drops the thinking of every assistant turn but the last, as reasoning models' templates do.
FORGETFUL = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEMPLATES = {"smollm2": SMOLLM2, "chatml": CHATML, "llama2": LLAMA2, "qwen2.5": QWEN25, "gemma": GEMMA}
STRIPS = {"llama2", "gemma"}
NO_SYSTEM = {"gemma"}

_CORPUS = [
    "The cat sat on the mat.\n\nAnd then?\n\nThe dog came in, and the cat went out.",
    "assistant\n\nuser\n\nsystem\nYou are a helpful assistant.\n\n\n\nA list:\n- one\n- two",
    "user\nThe user said hello.\nassistant\nHello, hello!  Two  spaces,   three.",
]


def byte_tokenizer(*control: str, bos: str, eos: str, pad: str | None = None) -> Any:
    """One token per byte, and control tokens."""
    return _tokenizer("bytes", control, bos, eos, pad)


def merging_tokenizer(*control: str, bos: str, eos: str, pad: str | None = None) -> Any:
    """A byte-level BPE in GPT-2's manner, whose tokens reach over line ends when nothing stops them."""
    return _tokenizer("merges", control, bos, eos, pad)


def spaced_tokenizer(*control: str, bos: str, eos: str, pad: str | None = None) -> Any:
    """In SentencePiece's manner: a space is written before the first word of a text."""
    return _tokenizer("spaces", control, bos, eos, pad)


def _tokenizer(make: str, control: tuple[str, ...], bos: str, eos: str, pad: str | None) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if make == "spaces":
        # Learn the merges first; then add the byte tokens, which are ordinary ones in such models.
        learner = Tokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        learner.train_from_iterator(_CORPUS * 4, trainers.BpeTrainer(vocab_size=120, show_progress=False))
        learnt = json.loads(learner.to_str())["model"]
        tokens = ["<unk>", *control, *(f"<0x{i:02X}>" for i in range(256)), *learnt["vocab"]]
        core = Tokenizer(
            models.BPE(
                vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
                merges=[tuple(merge) for merge in learnt["merges"]],
                byte_fallback=True,
                unk_token="<unk>",
                fuse_unk=True,
            )
        )
        core.pre_tokenizer = learner.pre_tokenizer
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=make == "merges")
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400 if make == "merges" else 256 + len(control),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=list(control),
            show_progress=False,
        )
        core.train_from_iterator(_CORPUS * 4, trainer)
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad or eos,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_for(template: str, make: str) -> Any:
    """A tokenizer with the control tokens that the template writes."""
    build = {"bytes": byte_tokenizer, "merges": merging_tokenizer, "spaces": spaced_tokenizer}[make]
    if template == "llama2":
        return build("<s>", "</s>", bos="<s>", eos="</s>")
    if template == "gemma":
        return build("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", bos="<bos>", eos="<eos>")
    return build("<|im_start|>", "<|im_end|>", bos="<|im_start|>", eos="<|im_end|>")
