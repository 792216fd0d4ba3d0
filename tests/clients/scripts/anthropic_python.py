"""The anthropic package: plain, streamed, counted, with tools, and its errors."""

import os

import anthropic
from anthropic import Anthropic
from checks import API_KEY, CAPITAL, MODEL, WEATHER, WEATHER_TOOL, is_paris, main

client = Anthropic(base_url=os.environ["PYSERVE_CLIENT_URL"], api_key=API_KEY, max_retries=0)
FUNCTION = WEATHER_TOOL["function"]
TOOL = {
    "name": FUNCTION["name"],
    "description": FUNCTION["description"],
    "input_schema": FUNCTION["parameters"],
}


def body(*messages, **options):
    turns = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
    greedy = {"temperature": 0}  # which this client has no word for
    return {
        "model": MODEL, "messages": turns, "max_tokens": 100, "extra_body": greedy, **options,
    }  # fmt: skip


def create():
    message = client.messages.create(**body(CAPITAL))
    is_paris(message.content[0].text)
    assert message.stop_reason == "end_turn" and message.usage.output_tokens > 0
    assert message.id.startswith("msg_") and message.role == "assistant"


def system_and_prefill():
    turns = [CAPITAL, {"role": "assistant", "content": "The capital of France is"}]
    message = client.messages.create(**body(*turns, system="Be brief."))
    is_paris(message.content[0].text)


def stream():
    whole = client.messages.create(**body(CAPITAL))
    with client.messages.stream(**body(CAPITAL)) as events:
        text = "".join(events.text_stream)
        last = events.get_final_message()
    assert text == last.content[0].text == whole.content[0].text
    assert last.usage.output_tokens == whole.usage.output_tokens
    kinds = [event.type for event in client.messages.create(**body(CAPITAL), stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"], kinds[:2]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"], kinds[-3:]


def count_tokens():
    asked = body(CAPITAL, tools=[TOOL], system="Be brief.")
    usage = client.messages.create(**asked).usage
    del asked["max_tokens"], asked["extra_body"]
    counted = client.messages.count_tokens(**asked).input_tokens
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def tools():
    first = client.messages.create(**body(WEATHER, tools=[TOOL]))
    call = first.content[-1]
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    assert first.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"temperature": 18}'}
    turns = [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    last = client.messages.create(**body(WEATHER, *turns, tools=[TOOL]))
    assert "18" in last.content[0].text and last.stop_reason == "end_turn"


def tools_stream():
    with client.messages.stream(**body(WEATHER, tools=[TOOL])) as events:
        call = events.get_final_message().content[-1]
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})


def forced_tool():
    choice = {"type": "tool", "name": "get_weather"}
    message = client.messages.create(**body("Hello", tools=[TOOL], tool_choice=choice))
    assert message.stop_reason == "tool_use" and isinstance(message.content[-1].input["city"], str)


def stop_sequence():
    message = client.messages.create(**body(CAPITAL, stop_sequences=["Paris"]))
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "Paris")


def errors():
    for options, kind in (
        ({"max_tokens": 0}, anthropic.BadRequestError),
        ({"model": "other"}, anthropic.NotFoundError),
    ):
        try:
            client.messages.create(**body(CAPITAL, **options))
        except kind as error:
            assert error.body["type"] == "error" and error.body["error"]["message"]
        else:
            raise AssertionError(f"no {kind.__name__}")


main(
    create, system_and_prefill, stream, count_tokens, tools, tools_stream, forced_tool,
    stop_sequence, errors,
)  # fmt: skip
