"""What is learned of a conversation, over the features that chat templates have, against a writer of our own."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from transformers import PreTrainedTokenizerFast

from trainer.data.encoding import Encoder
from trainer.data.tokenizers import END, load_tokenizer, train_tokenizer
from trainer.errors import UserError
from trainer.experiment.data_nodes import Data, Tokenizer

SPECIAL = ["<s>", "<system>", "<user>", "<assistant>", "<tool>", "<end>", "<think>", "</think>", "<call>", "</call>"]
# One template with the features of many, which a test switches on; `F` is filled in.
TEMPLATE = """
{%- set f = F %}
{%- set ns = namespace(first=none, last=-1, system='') %}
{%- set rest = messages %}
{%- if messages[0]['role'] == 'system' and f.system in ('first', 'last') %}
{%- set ns.system = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}{% endif %}
{%- for m in rest %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}
{%- if ns.first is none %}{% set ns.first = loop.index0 %}{% endif %}{% endif %}{% endfor %}
{%- if f.user and ns.last < 0 %}{{ raise_exception('No user query found') }}{% endif %}
{%- if f.bos %}{{ bos_token }}{% endif %}
{%- if f.system == 'default' and messages[0]['role'] != 'system' %}{{ '<system>You help.' + f.close }}{% endif %}
{%- for m in rest %}
{%- if m['role'] == 'assistant' %}
{%- set thought, answer = m['thought'] or '', m['content'] %}
{{- '<assistant>' + f.gap }}
{%- if f.thoughts == 'kept' or f.thoughts == 'last' and loop.index0 > ns.last %}
{%- if thought or f.hybrid %}{{ '<think>\n' + thought + '\n</think>' }}{% endif %}{% endif %}
{{- answer + f.close }}
{%- else %}
{{- '<' + m['role'] + '>' + f.gap }}
{%- if loop.index0 == {'first': ns.first, 'last': ns.last}.get(f.system) %}{{ ns.system }}{% endif %}
{{- m['content'] + f.close }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' + f.gap }}{% if f.opens %}{{ '<think>\n' }}{% endif %}{% endif %}
"""


def written(messages, f):
    """The same without a template: (text up to the last turn, what it begins with, what it says)."""
    place = f["system"] in ("first", "last") and messages[0]["role"] == "system"
    rest = messages[1:] if place else messages
    users = [at for at, message in enumerate(rest) if message["role"] == "user"]
    parts = []
    if f["bos"]:
        parts.append("<s>")
    if f["system"] == "default" and messages[0]["role"] != "system":
        parts.append(f"<system>You help.{f['close']}")
    for at, message in enumerate(rest):
        said = message["content"] + f["close"]
        if message["role"] == "assistant":
            shows = f["thoughts"] == "kept" or f["thoughts"] == "last" and at > max(users, default=-1)
            if shows and (message.get("thought") or f["hybrid"]):
                said = f"<think>\n{message.get('thought', '')}\n</think>{said}"
        elif place and users and at == (users[0] if f["system"] == "first" else users[-1]):
            said = messages[0]["content"] + "\n\n" + said
        parts += [f"<{message['role']}>{f['gap']}", said]
    return "".join(parts[:-2]), parts[-2], parts[-1]


def turns(messages, f, end):
    """For each answer the text before it, and what is learned: what follows the prompt of a server."""
    found = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, header, said = written(messages[:at + 1], f)
        opened = "<think>\n" if f["opens"] and said.startswith("<think>\n") else ""
        found.append((before + header + opened, said[len(opened):]))
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([(Data(tokenizer=Tokenizer(train_vocabulary=300)),
                      [{"text": "a question about cats and an answer, naïve café"}] * 3)], folder)
    one = PreTrainedTokenizerFast.from_pretrained(folder)
    one.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": SPECIAL[1:]})
    one.save_pretrained(folder)
    return load_tokenizer("data.tokenizer.path", str(folder), None)


@pytest.fixture
def chat(tokenizer):
    """What a template makes of a conversation: documents."""
    def encode(template, messages, data=None, as_written=True, **record):
        tokenizer.chat_template = template
        return Encoder(tokenizer, data or Data(messages="m"), as_written)([{"m": messages, **record}])

    yield encode
    tokenizer.chat_template = None


def runs(tokenizer, document):
    """(what stands before, what is learned) of each stretch of learned tokens."""
    found, begin = [], None
    for at, loss_mask in enumerate([*document.loss_mask.tolist(), False]):
        if loss_mask and begin is None:
            begin = at
        elif not loss_mask and begin is not None:
            found.append((tokenizer.decode(document.tokens[:begin]), tokenizer.decode(document.tokens[begin:at])))
            begin = None
    return found


def plain(*turns):
    return [{"role": role, "content": content} for role, content in turns]


words = some.sampled_from(["cats", "a question", "café and cats", "about it"])
message = some.fixed_dictionaries({"role": some.sampled_from(["user", "assistant"]), "content": words},
                                  optional={"thought": words})
features = some.fixed_dictionaries({
    "bos": some.booleans(), "system": some.sampled_from(["", "default", "first", "last"]), "user": some.booleans(),
    "thoughts": some.sampled_from(["kept", "last", "never"]), "hybrid": some.booleans(), "opens": some.booleans(),
    "gap": some.sampled_from(["", "\n"]), "close": some.sampled_from(["<end>\n", "<end>", "\n", ""])})


@settings(max_examples=120, deadline=None)
@given(features, some.lists(message, min_size=1, max_size=6), some.booleans())
def test_an_answer_is_learned_once_after_the_prompt_that_a_server_gives(tokenizer, f, messages, system):
    roles = [one["role"] for one in messages]
    if "assistant" not in roles or f["user"] and "user" not in roles[:roles.index("assistant")]:
        return  # what a template refuses has its own test
    if system and (f["system"] not in ("first", "last") or roles[0] == "user"):
        messages = [{"role": "system", "content": "be good"}, *messages]
    tokenizer.chat_template = TEMPLATE.replace("F", json.dumps(f).replace("true", "True").replace("false", "False"), 1)
    documents = Encoder(tokenizer, Data(messages="m"), True)([{"m": messages}])
    expected, end = turns(messages, f, END), not f["close"].startswith("<")
    found = [run for document in documents for run in runs(tokenizer, document)]
    if end:  # each sample that ends with an answer has an end-of-sequence token there, and no other
        found = [(before, said.removesuffix(END)) for before, said in found]
        assert all(int((one.tokens == tokenizer.eos_token_id).sum()) <= 1 for one in documents)
    assert sorted(found) == sorted((before, said) for before, said in expected if said)
    texts = {}  # every sample is what the template gives for the conversation up to some message
    for upto in range(1, len(messages) + 1):
        if upto > 1 or not f["user"] or messages[0]["role"] == "user":
            given = tokenizer.apply_chat_template(messages[:upto], tokenize=True, return_dict=True)["input_ids"]
            closes = end and messages[upto - 1]["role"] == "assistant"
            texts[tuple(given + [tokenizer.eos_token_id] * closes)] = messages[:upto]
    for one in documents:
        of = texts[tuple(one.tokens.tolist())]
        assert one.bytes.sum() == len(tokenizer.apply_chat_template(of, tokenize=False).encode())


CHATML = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>\n{% endfor %}"
          "{% if add_generation_prompt %}<assistant>{% endif %}")
CALLS = ("{% if tools %}<system>{{ tools | tojson }}<end>\n{% endif %}{% for m in messages %}<{{ m['role'] }}>"
         "{{ m['content'] }}{% for c in m['tool_calls'] %}<call>{{ c['function'] | tojson }}</call>{% endfor %}<end>\n"
         "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")


def said(tokenizer, documents):
    """What is learned, answer by answer."""
    return [answer for document in documents for _, answer in runs(tokenizer, document)]


def test_nothing_before_the_first_turn_is_learned(tokenizer, chat):
    """A conversation that begins with the assistant has no prompt; what opens it is the template's."""
    default = "<s>{% if messages[0]['role'] != 'system' %}<system>You help.<end>\n{% endif %}" + CHATML
    (one,) = chat(default, plain(("assistant", "hi"), ("user", "u"), ("assistant", "yes")))
    assert runs(tokenizer, one)[0] == ("<s><system>You help.<end>\n<assistant>", "hi<end>\n")
    assert said(tokenizer, [one]) == ["hi<end>\n", "yes<end>\n"]


def test_an_answer_before_the_first_question_is_learned_where_a_template_wants_one(tokenizer, chat):
    """What comes before such a question cannot be written alone, neither as a prompt nor as a conversation."""
    wants = "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('x') }}{% endif %}"
    turns = plain(("system", "s"), ("assistant", "cats"), ("user", "u"), ("assistant", "about"))
    (one,) = chat(wants + CHATML, turns)
    assert said(tokenizer, [one]) == ["cats<end>\n", "about<end>\n"]
    assert said(tokenizer, chat(wants + CHATML, turns[1:])) == ["cats<end>\n", "about<end>\n"]


def test_marks_of_a_template_decide(tokenizer, chat):
    marked = ("{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{% if "
              "loop.last %}<think></think>{% endif %}{{ m['content'] }}<end>{% endgeneration %}{% else %}"
              "{{ m['content'] }}<end>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
    messages = plain(("user", "u"), ("assistant", "cats"), ("user", "v"), ("assistant", "yes"))
    (one,) = chat(marked, messages)
    given = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert one.tokens.tolist() == given["input_ids"]
    assert one.loss_mask.tolist() == [mark == 1 for mark in given["assistant_masks"]]
    assert said(tokenizer, [one]) == ["cats<end>", "<think></think>yes<end>"]
    assert not Encoder(tokenizer, Data(messages="m")).notes
    chat(marked.replace("<end>{% endgeneration %}", "{% endgeneration %}<end>"), messages)
    (note,) = Encoder(tokenizer, Data(messages="m")).notes
    assert "leave out the end of a turn, '<end>'" in note


def test_a_template_that_changes_the_prompt_is_refused_with_a_way_out(tokenizer, chat):
    """Where a question is cut short once it is answered, an answer would be learned after another prompt."""
    cuts = ("{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'user' and not loop.last %}"
            "{{ m['content'][:3] }}{% else %}{{ m['content'] }}{% endif %}<end>\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")
    messages = plain(("user", "a question"), ("assistant", "cats"))
    with pytest.raises(UserError, match="another prompt than a server's: .*a question") as refused:
        chat(cuts, messages)
    assert "{% generation %} and {% endgeneration %}" in refused.value.way_out
    marked = cuts.replace("{% else %}", "{% elif m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
                          "{% endgeneration %}{% else %}")
    assert said(tokenizer, chat(marked, messages)) == ["cats"]
    counts = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | length }}")
    counts += "{% if add_generation_prompt %}9{% endif %}"
    with pytest.raises(UserError, match="rewrites what the assistant says"):
        chat(counts, messages)


@pytest.mark.parametrize(("template", "messages", "advice", "mended"), [
    ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
     plain(("system", "s"), ("user", "u"), ("assistant", "cats")), "put its text at the beginning of the first user",
     plain(("user", "s\nu"), ("assistant", "cats"))),
    ("{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('user first') }}{% endif %}" + CHATML,
     plain(("assistant", "hi"), ("user", "u"), ("assistant", "cats")), "remove the assistant's message",
     plain(("user", "u"), ("assistant", "cats"))),
    ("{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}"
     "{% endif %}{% endfor %}" + CHATML,
     plain(("user", "u"), ("user", "v"), ("assistant", "cats")), "join messages of one role",
     plain(("user", "u\nv"), ("assistant", "cats"))),
])
def test_what_a_template_refuses_is_said_with_what_it_takes(tokenizer, chat, template, messages, advice, mended):
    with pytest.raises(UserError, match="the chat template refuses a record") as refused:
        chat(template, messages)
    assert advice in refused.value.way_out
    assert said(tokenizer, chat(template, mended)) == ["cats<end>\n"]


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_a_conversation_begins_as_the_template_says(tokenizer, chat, writes, adds):
    """Whatever the tokenizer adds to other texts: serving adds nothing to what the template writes."""
    from tokenizers.processors import TemplateProcessing

    own, first = tokenizer.backend_tokenizer.post_processor, tokenizer.bos_token_id
    messages = plain(("user", "u"), ("assistant", "cats"))
    try:
        if adds:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A",
                                                                            special_tokens=[("<s>", first)])
        (one,) = chat("{{ bos_token }}" * writes + CHATML, messages)
        given = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        assert one.tokens.tolist() == given["input_ids"]
        assert (one.tokens == first).sum() == writes and not one.loss_mask[0]
    finally:
        if own is not None:
            tokenizer.backend_tokenizer.post_processor = own


# ---- calls and tools

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def called(arguments, content=""):
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    return [{"role": "user", "content": "u"}, {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "content": "cats"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], TOOL])
@pytest.mark.parametrize("arguments", [{"of": "it", "n": None}, '{"of": "it", "n": null}'])
@pytest.mark.parametrize("content", ["", None])
def test_tools_and_calls_are_written(tokenizer, chat, tools, arguments, content):
    data = Data(messages="m", tools="t")
    (one,) = chat(CALLS, called(arguments, content), data, t=tools)
    call = json.dumps({"name": "look", "arguments": {"of": "it", "n": None}})
    wanted = [f"<call>{call}</call><end>\n", "yes<end>\n"]
    assert said(tokenizer, [one]) == wanted
    assert tokenizer.decode(one.tokens).startswith(f"<system>{json.dumps([TOOL])}<end>\n<user>u<end>\n<assistant>")
    for none in (None, [], "", "[]"):  # records without tools, beside others
        assert tokenizer.decode(chat(CALLS, called(arguments, content), data, t=none)[0].tokens).startswith("<user>")
    concatenates = CALLS.replace("{{ m['content'] }}", "{{ '' + m['content'] }}")
    assert said(tokenizer, chat(concatenates, called(arguments, content), data, t=tools)) == wanted


def test_arguments_are_json_for_a_template_that_writes_them_as_they_are(tokenizer, chat):
    wanted = ["<call>look" + json.dumps({"of": "it"}) + "</call><end>\n", "yes<end>\n"]
    for write in ("c['function']['name'] + c['function']['arguments']", "c['function']['name'] ~ c.function.arguments"):
        template = CALLS.replace("c['function'] | tojson", write)
        for arguments in ({"of": "it"}, '{"of": "it"}'):
            assert said(tokenizer, chat(template, called(arguments))) == wanted


def test_arguments_stay_an_object_for_a_template_that_writes_calls_as_python(tokenizer, chat):
    python = ("c.function.name ~ '(' }}{% for name, value in c.function.arguments.items() %}{{ name ~ \"='\" ~ value "
              "~ \"'\" }}{% endfor %}{{ ')'")
    template = CALLS.replace("c['function'] | tojson", python)
    for arguments in ({"of": "it"}, '{"of": "it"}'):
        assert said(tokenizer, chat(template, called(arguments))) == ["<call>look(of='it')</call><end>\n", "yes<end>\n"]


def test_calls_and_thoughts_that_a_template_does_not_write_are_refused(tokenizer, chat):
    with pytest.raises(UserError, match="has tool_calls.*learned without its call") as refused:
        chat(CHATML, called({}))
    assert refused.value.way_out == "name another `data.tokenizer.path`, or remove records with calls"
    legacy = [{"role": "user", "content": "u"}, {"role": "assistant", "function_call": {"name": "f"}}]
    with pytest.raises(UserError, match="has function_call") as refused:
        chat(CALLS, legacy)
    assert "write calls as tool_calls" in refused.value.way_out
    thought = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "yes", "reasoning": "why"}]
    with pytest.raises(UserError, match="learned without its thought") as refused:
        chat(CHATML, thought)
    assert refused.value.way_out.endswith("keys: {unused: reasoning}")
    assert said(tokenizer, chat(CHATML, thought, Data(messages="m", keys={"unused": "reasoning"}))) == ["yes<end>\n"]
    # transformers gives templates a thought as `reasoning_content`, whatever it is called, but not as `reasoning`.
    thinks = CHATML.replace("{{ m['content'] }}", "{{ m.reasoning }}{{ m['content'] }}")
    thought[1]["reasoning_content"] = thought[1].pop("reasoning")
    with pytest.raises(UserError, match="learned without its thought") as refused:
        chat(thinks, thought)
    assert refused.value.way_out == "add to data: keys: {reasoning: reasoning_content}"
    mapped = chat(thinks, thought, Data(messages="m", keys={"reasoning": "reasoning_content"}))
    assert said(tokenizer, mapped) == ["whyyes<end>\n"]


def test_a_template_that_wants_tools_says_so(tokenizer, chat):
    wants = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + CHATML
    with pytest.raises(UserError, match="refuses a record") as refused:
        chat(wants, [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}])
    assert "name their field in `data.tools`" in refused.value.way_out


def test_tools_that_a_template_does_not_write_are_refused(tokenizer, chat):
    with pytest.raises(UserError, match="does not write tools") as refused:
        chat(CHATML, called({}), Data(messages="m", tools="t"), t=[TOOL])
    assert "leave out `data.tools` and records with calls" in refused.value.way_out
    with pytest.raises(UserError, match="a list of JSON schemas is expected"):
        chat(CALLS, called({}), Data(messages="m", tools="t"), t=["look"])


def test_a_message_that_says_nothing_is_refused_unless_it_calls(tokenizer, chat):
    with pytest.raises(UserError, match="a message has no content") as refused:
        chat(CHATML, [{"role": "user", "content": None}, {"role": "assistant", "content": "cats"}])
    assert 'write "" for one' in refused.value.way_out
    assert said(tokenizer, chat(CHATML, plain(("user", ""), ("assistant", "cats")))) == ["cats<end>\n"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_table_puts_no_nulls_into_calls(tokenizer, tmp_path, kind):
    """Columns of a table have a null wherever a record lacks what another has; nulls of JSON were written."""
    import pyarrow
    from pyarrow import parquet

    from trainer.data.dataset import encoder_for
    from trainer.data.sources import open_corpus

    records = [{"m": called({"city": "x"}), "t": [TOOL]}, {"m": called({"river": "y"})}] * 3
    file = tmp_path / f"records.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(records), file)
    data = Data(path=str(file), messages="m", tools="t")
    corpus = open_corpus(data, tmp_path / "cache")
    tokenizer.chat_template = CALLS.replace("m['tool_calls']", "(m['tool_calls'] if 'tool_calls' in m else [])")
    try:
        documents = encoder_for(tokenizer, data, corpus.train)(list(corpus.train))
        calls = [json.dumps({"name": "look", "arguments": one}) for one in ({"city": "x"}, {"river": "y"})]
        assert set(said(tokenizer, documents)) == {"yes<end>\n", *(f"<call>{call}</call><end>\n" for call in calls)}
        assert not any("null" in tokenizer.decode(one.tokens) for one in documents)
    finally:
        tokenizer.chat_template = None


def test_tools_that_no_record_has_are_refused(tmp_path):
    from trainer.data.sources import open_corpus

    (tmp_path / "records.jsonl").write_text((json.dumps({"m": called({})}) + "\n") * 2)
    with pytest.raises(UserError, match="no record has such a field") as refused:
        open_corpus(Data(path=str(tmp_path / "records.jsonl"), messages="m", tools="tolos"), tmp_path / "cache")
    assert refused.value.key == "data.tools" and refused.value.way_out == "their fields are m"


# ---- other formats

def test_other_names_are_mapped_as_the_refusal_says(tokenizer, chat):
    import re

    import yaml

    talk = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "cats"}]
    with pytest.raises(UserError, match="not {role, content}") as refused:
        chat(CHATML, talk)
    offered = re.fullmatch("add to data: (.*)", refused.value.way_out)[1]
    data = Data(messages="m", **yaml.safe_load(f"{{{offered}}}"))
    assert data.keys == {"role": "from", "content": "value"} and data.roles == {"human": "user", "gpt": "assistant"}
    assert said(tokenizer, chat(CHATML, talk, data)) == ["cats<end>\n"]
    with pytest.raises(UserError, match="role 'model', and only the role assistant is learned") as refused:
        chat(CHATML, plain(("user", "u"), ("model", "cats")))
    data = Data(messages="m", **yaml.safe_load(refused.value.way_out.removeprefix("add to data: ")))
    assert said(tokenizer, chat(CHATML, plain(("user", "u"), ("model", "cats")), data)) == ["cats<end>\n"]
    assert said(tokenizer, chat(CHATML, json.dumps(plain(("user", "u"), ("assistant", "cats"))))) == ["cats<end>\n"]


def test_what_is_for_messages_needs_them():
    with pytest.raises(ValueError, match="`messages` is not given"):
        Data(tools="t")


def test_contents_in_parts_are_what_the_template_wants(tokenizer, chat):
    parts = [{"role": role, "content": [{"type": "text", "text": text} for text in content]}
             for role, content in (("user", ["u", "v"]), ("assistant", ["cats", " and"]))]
    loop = "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
    both = f"{{% if m['content'] is string %}}{{{{ m['content'] }}}}{{% else %}}{loop}{{% endif %}}"
    for content in ("{{ m['content'] }}", loop, both):
        template = CHATML.replace("{{ m['content'] }}", content)
        for messages in (parts, plain(("user", "uv"), ("assistant", "cats and"))):
            (one,) = chat(template, messages)
            assert runs(tokenizer, one) == [("<user>uv<end>\n<assistant>", "cats and<end>\n")]
    with pytest.raises(UserError, match="a part of type 'image_url' in its content, and only text is learned"):
        chat(CHATML, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
