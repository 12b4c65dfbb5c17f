"""Every row of the contract's error table: the status, the field and index it names, and that nothing changed."""

import math

import grpc
import pytest
from attention_oracle import Model
from attnd_harness import CODE, pb

FP32 = pb.DTYPE_FP32


def expect(error, code, *words):
    assert error.code() == code, f"{error.code()}: {error.details()}"
    for word in words:
        assert word in error.details(), f"{word!r} is not named: {error.details()}"


class Call:
    """One way to ask for layer 0 of a step: both must fail alike, and change nothing."""

    def __init__(self, via):
        self.via = via

    def error(self, model, request):
        """`request`: a DecodeRequest, turned into the stream's form where that is wanted."""
        if self.via == "unary":
            return model.api.error("Decode", request)
        stream_request = pb.DecodeStreamRequest(
            begin=pb.StepBegin(
                sequences=request.sequences,
                query_lengths=request.query_lengths,
                options=request.options if request.HasField("options") else None,
                dtype=request.dtype,
                read_only=not request.HasField("k") and not request.HasField("v"),
            ),
            layer=request.layer,
        )
        for name in ("q", "k", "v"):
            if request.HasField(name):
                setattr(stream_request, name, getattr(request, name))
        with model.api.stream() as stream:
            stream.send(stream_request)
            return stream.error()


@pytest.fixture(params=["unary", "stream"])
def call(request):
    return Call(request.param)


@pytest.fixture
def filled(model):
    """Three sequences; afterwards they are as they were, and a step on all of them works."""
    handles = model.open_filled([20, 16, 3])
    yield handles
    model.check_lengths()
    model.step(handles)


def step_request(model, handles, lengths=None, **changes):
    request = model.decode_request(handles, lengths, model.layer(sum(lengths or [1] * len(handles))))
    for name, value in changes.items():
        if value is None:
            request.ClearField(name)
        else:
            setattr(request, name, value)
    return request


# INVALID_ARGUMENT


@pytest.mark.parametrize("change", [-1, +1, "row less", "row more", "empty"])
@pytest.mark.parametrize("tensor", ["q", "k", "v"])
def test_a_tensor_of_the_wrong_size_is_named(model, filled, call, tensor, change):
    request = step_request(model, filled)
    good = getattr(request, tensor)
    row = len(good) // 3
    bad = {-1: good[:-1], +1: good + b"\0", "row less": good[:-row], "row more": good + good[:row], "empty": b""}[
        change
    ]
    setattr(request, tensor, bad)
    expect(call.error(model, request), CODE.INVALID_ARGUMENT, tensor + ":")


@pytest.mark.parametrize("tensor", ["k", "v"])
def test_keys_without_values_and_values_without_keys_are_refused(model, filled, call, tensor):
    expect(call.error(model, step_request(model, filled, **{tensor: None})), CODE.INVALID_ARGUMENT, tensor)


def test_a_decode_call_without_queries_is_refused(model, filled):
    expect(model.api.error("Decode", step_request(model, filled, q=None)), CODE.INVALID_ARGUMENT, "q")


def test_keys_and_values_in_a_read_only_step_are_refused(model, filled):
    with model.api.stream() as stream:
        stream.send(pb.DecodeStreamRequest(begin=model.step_begin(filled, read_only=True), **model.layer(3).fields()))
        expect(stream.error(), CODE.INVALID_ARGUMENT, "k")


@pytest.mark.parametrize("dtype", [pb.DTYPE_BF16, pb.DTYPE_FP16, 4, 77, -1, 2**31 - 1])
def test_the_wrong_dtype_is_refused(model, filled, call, dtype):
    expect(call.error(model, step_request(model, filled, dtype=dtype)), CODE.INVALID_ARGUMENT, "dtype")


def test_an_unspecified_dtype_is_the_servers(model, filled):
    response = model.api.call("Decode", step_request(model, filled, dtype=pb.DTYPE_UNSPECIFIED))
    model.api.abort(response.step)


@pytest.mark.parametrize("layer", [1, 2, 3, 2**31, 2**32 - 1])
def test_a_step_starts_with_layer_0(model, filled, call, layer):
    expect(call.error(model, step_request(model, filled, layer=layer)), CODE.INVALID_ARGUMENT, "layer")


@pytest.mark.parametrize("layer", [2, 2**32 - 1])
def test_a_read_of_a_layer_that_is_not_there_is_refused(model, filled, call, layer):
    expect(call.error(model, step_request(model, filled, layer=layer, k=None, v=None)), CODE.INVALID_ARGUMENT, "layer")


@pytest.mark.parametrize("layer", [0, 2, 2**32 - 1])
def test_a_layer_out_of_order_leaves_a_unary_step_where_it_was(model, filled, layer):
    layers = model.layers(3)
    first = model.api.call("Decode", model.decode_request(filled, None, layers[0]))
    wrong = pb.DecodeRequest(step=first.step, layer=layer, **layers[1].fields())
    expect(model.api.error("Decode", wrong), CODE.INVALID_ARGUMENT, "layer")
    second = model.api.call("Decode", pb.DecodeRequest(step=first.step, layer=1, **layers[1].fields()))
    assert second.committed
    for i, handle in enumerate(filled):
        model.grow(handle, [(layer.k[i : i + 1], layer.v[i : i + 1]) for layer in layers])
    model.read(filled)


def test_a_layer_out_of_order_ends_a_stream_and_its_step(model, filled):
    layers = model.layers(3)
    with model.api.stream() as stream:
        stream.ask(pb.DecodeStreamRequest(begin=model.step_begin(filled), layer=0, **layers[0].fields()))
        stream.send(pb.DecodeStreamRequest(layer=0, **layers[1].fields()))
        expect(stream.error(), CODE.INVALID_ARGUMENT, "layer")


def test_a_layer_of_the_wrong_size_midway_aborts_nothing_of_a_unary_step(model, filled):
    layers = model.layers(3)
    first = model.api.call("Decode", model.decode_request(filled, None, layers[0]))
    wrong = pb.DecodeRequest(step=first.step, layer=1, **layers[1].fields())
    wrong.v = wrong.v[:-4]
    expect(model.api.error("Decode", wrong), CODE.INVALID_ARGUMENT, "v:")
    model.api.abort(first.step)


def test_later_layers_may_not_name_other_sequences(model, filled):
    first = model.api.call("Decode", model.decode_request(filled, None, model.layer(3)))
    (stranger,) = model.open_filled([4])
    wrong = model.decode_request([filled[0], filled[1], stranger], None, model.layer(3), number=1)
    wrong.step = first.step
    expect(model.api.error("Decode", wrong), CODE.INVALID_ARGUMENT, "sequences")
    model.api.abort(first.step)


@pytest.mark.parametrize("lengths", [[1], [1, 1], [1, 1, 1, 1]])
def test_as_many_query_lengths_as_sequences(model, filled, call, lengths):
    request = step_request(model, filled)
    request.query_lengths.extend(lengths)
    expect(call.error(model, request), CODE.INVALID_ARGUMENT, "query_lengths")


@pytest.mark.parametrize("length", [0, 129, 2**31, 2**32 - 1])
@pytest.mark.parametrize("index", [0, 2])
def test_a_query_length_out_of_range_is_named_with_its_index(model, filled, call, index, length):
    request = step_request(model, filled)
    lengths = [1, 1, 1]
    lengths[index] = length
    request.query_lengths.extend(lengths)
    expect(call.error(model, request), CODE.INVALID_ARGUMENT, f"query_lengths[{index}]")


def test_a_sum_of_query_lengths_beyond_32_bits_is_refused(model, filled, call):
    request = step_request(model, filled)
    request.query_lengths.extend([2**31, 2**31, 3])
    expect(call.error(model, request), CODE.INVALID_ARGUMENT, "query_lengths[0]")


def test_an_empty_batch_is_refused(model, call):
    expect(call.error(model, pb.DecodeRequest(q=b"", k=b"", v=b"")), CODE.INVALID_ARGUMENT, "sequences")


def test_a_batch_over_the_limit_is_refused(shared_server, call):
    model = Model(shared_server(ranks=1, max_batch=4).api())
    handles = model.open(5)
    expect(call.error(model, step_request(model, handles)), CODE.INVALID_ARGUMENT, "sequences")
    model.step(handles[:4])


BAD_NUMBERS = {"negative": -1.0, "nan": math.nan, "inf": math.inf, "minus_inf": -math.inf}


@pytest.mark.parametrize("value", BAD_NUMBERS)
@pytest.mark.parametrize("option", ["softmax_scale", "softcap"])
def test_options_must_be_finite_and_positive(model, filled, call, option, value):
    request = step_request(model, filled)
    setattr(request.options, option, BAD_NUMBERS[value])
    expect(call.error(model, request), CODE.INVALID_ARGUMENT, option)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_as_many_sinks_as_query_heads(model, filled, call, count):
    request = step_request(model, filled)
    request.options.sinks.extend([0.0] * count)
    expect(call.error(model, request), CODE.INVALID_ARGUMENT, "sinks")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sinks_must_be_numbers(model, filled, call, value):
    request = step_request(model, filled)
    request.options.sinks.extend([0.0, 0.0, value, 0.0])
    expect(call.error(model, request), CODE.INVALID_ARGUMENT, "sinks[2]")


@pytest.mark.parametrize("rank", [2, 3, 64, 2**31, 2**32 - 1])
def test_an_explicit_dp_rank_out_of_range_is_refused(api, rank):
    request = pb.OpenSequencesRequest(count=1, placement=pb.PLACEMENT_EXPLICIT, dp_rank=rank)
    expect(api.error("OpenSequences", request), CODE.INVALID_ARGUMENT, "dp_rank")


@pytest.mark.parametrize("placement", [4, 99, -1])
def test_an_unknown_placement_is_refused(api, placement):
    request = b"\x08\x01\x10" + (bytes([placement]) if placement > 0 else b"\xff" * 9 + b"\x01")
    expect(api.error("OpenSequences", request), CODE.INVALID_ARGUMENT, "placement")


def test_opening_no_sequence_is_refused(api):
    expect(api.error("OpenSequences", pb.OpenSequencesRequest(count=0)), CODE.INVALID_ARGUMENT, "count")


@pytest.mark.parametrize("length", [21, 2**32, 2**64 - 1])
def test_forking_or_truncating_beyond_the_length_is_refused(model, filled, length):
    for name, request in (("ForkSequence", pb.ForkSequenceRequest), ("TruncateSequence", pb.TruncateSequenceRequest)):
        expect(model.api.error(name, request(sequence=filled[0], length=length)), CODE.INVALID_ARGUMENT, "length")


def begin(handle, tokens=2, dtype=FP32):
    return pb.AppendKvRequest(begin=pb.AppendKvBegin(sequence=handle, tokens=tokens, dtype=dtype))


def chunk(model, tokens=2, layer=0, offset=0, rows=None):
    rows = tokens if rows is None else rows
    return pb.AppendKvRequest(
        layer=layer, token_offset=offset, tokens=tokens, k=model.keys(rows).tobytes(), v=model.values(rows).tobytes()
    )


def test_bad_uploads_are_refused_by_field(model, filled):
    handle = filled[0]
    short_k = chunk(model)
    short_k.k = short_k.k[:-1]
    long_v = chunk(model)
    long_v.v = long_v.v + b"\0"
    no_k = chunk(model)
    no_k.ClearField("k")
    tensors_only = chunk(model, tokens=0, rows=2)
    for what, messages, words in (
        ("no message", [], ["begin"]),
        ("no begin", [chunk(model)], ["begin"]),
        ("two begins", [begin(handle), begin(handle)], ["begin"]),
        ("no tokens", [begin(handle, tokens=0)], ["tokens"]),
        ("wrong dtype", [begin(handle, dtype=pb.DTYPE_BF16)], ["dtype"]),
        ("unknown dtype", [begin(handle, dtype=9)], ["dtype"]),
        ("layer too large", [begin(handle), chunk(model, layer=2)], ["layer"]),
        ("a gap", [begin(handle), chunk(model, tokens=1, offset=1)], ["token_offset"]),
        ("twice the same", [begin(handle), chunk(model, tokens=1), chunk(model, tokens=1)], ["token_offset"]),
        ("too many tokens", [begin(handle), chunk(model, tokens=3)], ["tokens"]),
        ("offset overflow", [begin(handle), chunk(model, tokens=2, offset=2**32 - 1)], ["token_offset"]),
        ("a huge count", [begin(handle), chunk(model, tokens=2**32 - 1, rows=2)], ["tokens"]),
        ("k a byte short", [begin(handle), short_k], ["k:"]),
        ("v a byte long", [begin(handle), long_v], ["v:"]),
        ("no k", [begin(handle), no_k], ["k"]),
        ("tensors of no tokens", [begin(handle), tensors_only], ["tokens"]),
    ):
        error = model.api.error("AppendKv", messages)
        assert error.code() == CODE.INVALID_ARGUMENT, (what, error.code(), error.details())
        for word in words:
            assert word in error.details(), (what, error.details())
    model.check_lengths()


# NOT_FOUND


def every_use_of(model, handle, good):
    """Each call that can name a sequence, with `handle` in the second place where there is one."""
    layer = model.layer(2)
    yield model.api.error("DescribeSequences", pb.DescribeSequencesRequest(sequences=[good, handle])), "sequences[1]"
    yield model.api.error("CloseSequences", pb.CloseSequencesRequest(sequences=[good, handle])), "sequences[1]"
    yield model.api.error("ForkSequence", pb.ForkSequenceRequest(sequence=handle)), "sequence"
    yield model.api.error("TruncateSequence", pb.TruncateSequenceRequest(sequence=handle)), "sequence"
    yield model.api.error("MoveSequence", pb.MoveSequenceRequest(sequence=handle, dp_rank=1)), "sequence"
    yield model.api.error("AppendKv", [begin(handle), chunk(model)]), "sequence"
    yield model.api.error("ExportKv", pb.ExportKvRequest(sequence=handle)), "sequence"
    yield model.api.error("Decode", model.decode_request([good, handle], None, layer)), "sequences[1]"
    yield (
        model.api.error("Decode", model.decode_request([good, handle], None, model.layer(2, read_only=True))),
        "sequences[1]",
    )
    with model.api.stream() as stream:
        stream.send(pb.DecodeStreamRequest(begin=model.step_begin([good, handle]), **layer.fields()))
        yield stream.error(), "sequences[1]"


def expect_unknown_everywhere(model, handle):
    (good,) = model.open_filled([7])
    for error, place in every_use_of(model, handle, good):
        expect(error, CODE.NOT_FOUND, place)
    model.check_lengths([good])
    model.step([good])


@pytest.mark.parametrize("change", ["zero", "all ones", "closed", "stale", *(f"bit {bit}" for bit in range(0, 64, 7))])
def test_an_unknown_handle_is_not_found_everywhere(model, change):
    (handle,) = model.open_filled([5])
    if change in ("closed", "stale"):
        model.close([handle])
        if change == "stale":  # its slot is in use again
            model.open_filled([5] * 8)
        forged = handle
    else:
        forged = {"zero": 0, "all ones": 2**64 - 1}.get(change)
        if forged is None:
            forged = handle ^ (1 << int(change.split()[1]))
    expect_unknown_everywhere(model, forged)


def test_handles_of_a_restarted_server_are_not_found(start_server):
    first = start_server(ranks=1)
    handles = Model(first.api()).open(200)
    first.kill()
    model = Model(start_server(ranks=1).api())
    model.open(200)
    for handle in handles:
        expect(model.api.error("DescribeSequences", pb.DescribeSequencesRequest(sequences=[handle])), CODE.NOT_FOUND)
    expect_unknown_everywhere(model, handles[0])


def test_closing_with_one_bad_handle_closes_nothing(model):
    handles = model.open_filled([3, 4])
    error = model.api.error("CloseSequences", pb.CloseSequencesRequest(sequences=[*handles, 12345]))
    expect(error, CODE.NOT_FOUND, "sequences[2]")
    model.check_lengths()


def test_closing_the_same_sequence_twice_in_one_call_closes_nothing_or_once(model):
    (handle,) = model.open_filled([3])
    error = model.api.error("CloseSequences", pb.CloseSequencesRequest(sequences=[handle, handle]))
    assert error.code() in (CODE.NOT_FOUND, CODE.FAILED_PRECONDITION), error
    assert "sequences[1]" in error.details()
    model.check_lengths()


@pytest.mark.parametrize("step", [1, 2**64 - 1, "ended", "aborted"])
def test_an_unknown_step_is_not_found(model, step):
    handles = model.open_filled([5])
    layers = model.layers(1)
    if step in ("ended", "aborted"):
        first = model.api.call("Decode", model.decode_request(handles, None, layers[0]))
        if step == "ended":
            model.api.call("Decode", pb.DecodeRequest(step=first.step, layer=1, **layers[1].fields()))
            model.grow(handles[0], [(layer.k, layer.v) for layer in layers])
        else:
            model.api.abort(first.step)
        step = first.step
    error = model.api.error("Decode", pb.DecodeRequest(step=step, layer=1, **layers[1].fields()))
    expect(error, CODE.NOT_FOUND, "step")
    expect(model.api.error("Decode", pb.DecodeRequest(step=step, abort=True)), CODE.NOT_FOUND, "step")
    model.check_lengths()


# FAILED_PRECONDITION, ABORTED


def test_the_same_sequence_twice_in_a_step_is_refused(model, filled, call):
    request = step_request(model, [filled[0], filled[1], filled[0]])
    expect(call.error(model, request), CODE.FAILED_PRECONDITION, "sequences[2]")


def test_a_sequence_in_a_step_is_busy_for_everybody_else(server, model, filled, call):
    other = Model(server.api())
    other.stored = model.stored
    layers = model.layers(3)
    first = model.api.call("Decode", model.decode_request(filled, None, layers[0]))
    expect(call.error(other, step_request(other, [filled[1]])), CODE.ABORTED, "sequences[0]")
    expect(other.api.error("AppendKv", [begin(filled[0]), chunk(model)]), CODE.ABORTED, "sequence")
    for name, request in (
        ("TruncateSequence", pb.TruncateSequenceRequest(sequence=filled[0], length=1)),
        ("CloseSequences", pb.CloseSequencesRequest(sequences=[filled[0]])),
    ):
        expect(other.api.error(name, request), CODE.ABORTED, "sequence")
    assert [info.busy for info in model.api.describe(filled)] == [True] * 3
    other.read(filled)  # what is committed can be read meanwhile
    second = model.api.call("Decode", pb.DecodeRequest(step=first.step, layer=1, **layers[1].fields()))
    assert second.committed
    for i, handle in enumerate(filled):
        model.grow(handle, [(layer.k[i : i + 1], layer.v[i : i + 1]) for layer in layers])


def test_a_sequence_in_an_upload_is_busy_for_everybody_else(model, filled, call):
    errors = []

    def messages():
        yield begin(filled[0])
        yield chunk(model)
        while not model.api.describe([filled[0]])[0].busy:
            pass
        errors.append(call.error(model, step_request(model, filled)))
        errors.append(model.api.error("AppendKv", [begin(filled[0]), chunk(model)]))

    with pytest.raises(grpc.RpcError):  # incomplete
        model.api.method("AppendKv")(messages(), timeout=30)
    for error in errors:
        expect(error, CODE.ABORTED, "sequence")
    assert len(errors) == 2


# RESOURCE_EXHAUSTED


def expect_exhausted(error, *words):
    expect(error, CODE.RESOURCE_EXHAUSTED, *words)
    pushback = dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms")
    assert pushback is not None and int(pushback) > 0, f"no retry hint: {error.trailing_metadata()}"


@pytest.fixture
def tiny(start_server):
    """Eight pages of 16 tokens on one rank."""
    return Model(start_server(ranks=1, pages=8).api())


def test_a_step_that_needs_more_pages_than_there_are_changes_nothing(tiny, call):
    handles = tiny.open_filled([16 * 5, 32])
    expect_exhausted(call.error(tiny, step_request(tiny, handles)), "pages")
    tiny.check_lengths()
    tiny.read(handles)
    tiny.truncate(handles[0], 16 * 4)
    tiny.step(handles)
    tiny.check_lengths()


def test_an_upload_that_needs_more_pages_than_there_are_changes_nothing(tiny):
    (handle,) = tiny.open_filled([16 * 5])
    expect_exhausted(tiny.api.error("AppendKv", list(tiny.append_messages(handle, tiny.rows(16 * 3 + 1)))), "pages")
    tiny.check_lengths()
    assert tiny.api.info().ranks[0].pages_free == 3
    tiny.append(handle, 16 * 3)
    tiny.read([handle])


def test_pages_that_a_step_takes_are_missing_elsewhere_until_it_is_aborted(tiny):
    one, other = tiny.open_filled([16 * 3, 16 * 4])
    first = tiny.api.call("Decode", tiny.decode_request([one], None, tiny.layer(1)))
    expect_exhausted(tiny.api.error("Decode", tiny.decode_request([other], None, tiny.layer(1))), "pages")
    expect_exhausted(tiny.api.error("AppendKv", list(tiny.append_messages(other, tiny.rows(1)))), "pages")
    tiny.api.abort(first.step)
    tiny.step([other])
    tiny.check_lengths()


def test_a_copy_on_write_needs_a_page_too(tiny):
    (parent,) = tiny.open_filled([16 * 7 + 1])
    child = tiny.fork(parent, 16 * 7 + 1)
    expect_exhausted(tiny.api.error("Decode", tiny.decode_request([child], None, tiny.layer(1))), "pages")
    expect_exhausted(tiny.api.error("Decode", tiny.decode_request([parent], None, tiny.layer(1))), "pages")
    tiny.check_lengths()
    tiny.close([child])
    tiny.step([parent])


def test_a_spread_sequence_runs_out_with_its_fullest_rank(start_server):
    model = Model(start_server(ranks=2, pages=40).api())
    (whole,) = model.open_filled([64], pb.PLACEMENT_EXPLICIT, 1)
    (spread,) = model.open_filled([512], pb.PLACEMENT_SPREAD)
    expect_exhausted(model.api.error("AppendKv", list(model.append_messages(spread, model.rows(1024)))), "pages")
    model.check_lengths()
    model.step([whole, spread])


def test_exhaustion_many_times_over_loses_nothing(tiny):
    handles = tiny.open_filled([30, 30])
    for _ in range(50):
        expect_exhausted(tiny.api.error("Decode", tiny.decode_request(handles, [100, 100], tiny.layer(200))), "pages")
        expect_exhausted(tiny.api.error("AppendKv", list(tiny.append_messages(handles[0], tiny.rows(100)))), "pages")
    assert tiny.api.info().ranks[0].pages_free == 4
    tiny.step(handles, [32, 32])
    tiny.check_lengths()


def test_too_many_sequences_are_refused_all_or_none(start_server):
    api = start_server(ranks=1, max_sequences=10).api()
    api.open(7)
    expect_exhausted(api.error("OpenSequences", pb.OpenSequencesRequest(count=4)), "sequences")
    assert api.info().ranks[0].sequences == 7
    api.open(3)
    expect_exhausted(api.error("OpenSequences", pb.OpenSequencesRequest(count=1)), "sequences")
    expect_exhausted(
        api.error("ForkSequence", pb.ForkSequenceRequest(sequence=next(iter(api.open_handles)))), "sequences"
    )


@pytest.mark.parametrize("count", [2**20, 2**31, 2**32 - 1])
def test_an_absurd_count_of_sequences_is_refused_at_once(api, count):
    error = api.error("OpenSequences", pb.OpenSequencesRequest(count=count), timeout=10)
    assert error.code() in (CODE.RESOURCE_EXHAUSTED, CODE.INVALID_ARGUMENT), error


def test_a_sequence_over_its_longest_length_is_refused(start_server, call):
    model = Model(start_server(ranks=1, max_sequence_tokens=100).api())
    (handle,) = model.open_filled([99])
    error = call.error(model, step_request(model, [handle], [2]))
    assert error.code() in (CODE.RESOURCE_EXHAUSTED, CODE.INVALID_ARGUMENT) and "sequences[0]" in error.details(), error
    error = model.api.error("AppendKv", list(model.append_messages(handle, model.rows(2))))
    assert error.code() in (CODE.RESOURCE_EXHAUSTED, CODE.INVALID_ARGUMENT), error
    model.step([handle])


def test_an_upload_of_four_billion_tokens_is_refused_at_once(model, filled):
    error = model.api.error("AppendKv", [begin(filled[0], tokens=2**32 - 1)], timeout=10)
    assert error.code() in (CODE.RESOURCE_EXHAUSTED, CODE.INVALID_ARGUMENT), error


def test_a_message_over_the_limit_is_refused(start_server):
    server = start_server(ranks=1, max_message_mb=1)
    model = Model(server.api())
    (handle,) = model.open_filled([3])
    request = model.decode_request([handle], None, model.layer(1))
    request.q = b"\0" * (2 << 20)
    expect(model.api.error("Decode", request), CODE.RESOURCE_EXHAUSTED)
    with model.api.stream() as stream:
        stream.send(pb.DecodeStreamRequest(begin=model.step_begin([handle]), q=b"\0" * (2 << 20)))
        expect(stream.error(), CODE.RESOURCE_EXHAUSTED)
    expect(
        model.api.error("AppendKv", [begin(handle), pb.AppendKvRequest(k=b"\0" * (2 << 20))]), CODE.RESOURCE_EXHAUSTED
    )
    model.check_lengths()
    model.step([handle])


def test_a_header_of_a_million_handles_is_refused_without_harm(api):
    error = api.error("DescribeSequences", pb.DescribeSequencesRequest(sequences=[7] * 1_000_000).SerializeToString())
    assert error.code() in (CODE.RESOURCE_EXHAUSTED, CODE.NOT_FOUND, CODE.INVALID_ARGUMENT), error


# UNAUTHENTICATED, PERMISSION_DENIED, tenants

TENANTS = """\
auth:
  tenants:
    - name: alice
      token: alice-token-0123456789
      max_pages: 4
      max_sequences: 3
    - name: bob
      token: bob-token-0123456789ab
"""


@pytest.fixture
def tenants(start_server, tmp_path):
    config = tmp_path / "tenants.yaml"
    config.write_text(TENANTS)
    server = start_server(config=config, ranks=1, pages=64)
    server.leaks_expected = True  # a leak check needs credentials: below
    alice, bob = (
        Model(server.api(metadata=[("authorization", f"Bearer {token}")]))
        for token in ("alice-token-0123456789", "bob-token-0123456789ab")
    )
    yield server, alice, bob
    for model in (alice, bob):
        model.api.release_all()
    alice.api.assert_all_free()


def test_calls_without_credentials_are_unauthenticated(tenants):
    server, _, _ = tenants
    for metadata in (
        [],
        [("authorization", "")],
        [("authorization", "Basic abc")],
        [("authorization", "alice-token-0123456789")],
    ):
        api = server.api(metadata=metadata)
        for name in ("GetServerInfo", "OpenSequences", "Decode", "DescribeSequences"):
            expect(api.error(name, b""), CODE.UNAUTHENTICATED)
        expect(api.error("AppendKv", [begin(1)]), CODE.UNAUTHENTICATED)
        expect(api.error("ExportKv", b""), CODE.UNAUTHENTICATED)
        with api.stream() as stream:
            expect(stream.error(), CODE.UNAUTHENTICATED)


def test_wrong_credentials_are_denied_and_not_repeated(tenants):
    server, _, _ = tenants
    for token in ("wrong-token-0123456789", "alice-token-012345678", "alice-token-0123456789x"):
        api = server.api(metadata=[("authorization", f"Bearer {token}")])
        error = api.error("GetServerInfo", b"")
        expect(error, CODE.PERMISSION_DENIED)
        assert token not in error.details()
        expect(api.error("OpenSequences", pb.OpenSequencesRequest(count=1)), CODE.PERMISSION_DENIED)
    assert "alice-token" not in server.log() and "wrong-token" not in server.log()


def test_a_foreign_handle_is_not_found_and_says_nothing_of_its_owner(tenants):
    _, alice, bob = tenants
    (handle,) = alice.open_filled([10])
    expect_unknown_everywhere(bob, handle)
    stranger = bob.api.error("DescribeSequences", pb.DescribeSequencesRequest(sequences=[handle]))
    forged = bob.api.error("DescribeSequences", pb.DescribeSequencesRequest(sequences=[handle ^ (1 << 40)]))
    assert stranger.details() == forged.details()
    alice.check_lengths()
    alice.step([handle])


def test_a_foreign_step_is_not_found(tenants):
    _, alice, bob = tenants
    (handle,) = alice.open_filled([10])
    layers = alice.layers(1)
    first = alice.api.call("Decode", alice.decode_request([handle], None, layers[0]))
    expect(
        bob.api.error("Decode", pb.DecodeRequest(step=first.step, layer=1, **layers[1].fields())),
        CODE.NOT_FOUND,
        "step",
    )
    expect(bob.api.error("Decode", pb.DecodeRequest(step=first.step, abort=True)), CODE.NOT_FOUND, "step")
    second = alice.api.call("Decode", pb.DecodeRequest(step=first.step, layer=1, **layers[1].fields()))
    assert second.committed


def test_a_tenant_over_its_quota_is_refused_and_others_go_on(tenants):
    _, alice, bob = tenants
    (handle,) = alice.open_filled([64])
    expect_exhausted(alice.api.error("Decode", alice.decode_request([handle], None, alice.layer(1))))
    expect_exhausted(alice.api.error("AppendKv", list(alice.append_messages(handle, alice.rows(1)))))
    alice.open(2)
    expect_exhausted(alice.api.error("OpenSequences", pb.OpenSequencesRequest(count=1)))
    alice.check_lengths()
    bob.step(bob.open_filled([64, 64, 64, 64]))
    alice.truncate(handle, 63)
    alice.step([handle])


def test_health_needs_no_credentials(tenants):
    server, _, _ = tenants
    answer = server.api().method("Check", service="/grpc.health.v1.Health/")(b"", timeout=30)
    assert answer == b"\x08\x01"
