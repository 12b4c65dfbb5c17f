"""ExportKv: keys and values read back, bit by bit, of what the sequence held when the call began."""

import grpc
import numpy as np
import pytest
from attention_oracle import Model, fp8_meant, options
from attnd_harness import CODE, TIMEOUT_S, Proxy, pb

WHOLE, SPREAD = pb.PLACEMENT_LEAST_TOKENS, pb.PLACEMENT_SPREAD
LARGEST_CHUNK = 1.1 * 2**20  # bytes of k and v in one response of more than one token


def request(handle, position=0, tokens=0):
    return pb.ExportKvRequest(sequence=handle, position=position, tokens=tokens)


def parsed(responses):
    return [pb.ExportKvResponse.FromString(one) for one in responses]


def join(model, responses):
    """[(k, v)] a layer of all responses of a call: the layers in order, a layer's chunks in order without gaps."""
    geometry = model.geometry
    total = responses[0].total
    if total == 0:
        (only,) = responses
        assert (only.layer, only.token_offset, only.tokens, only.k, only.v) == (0, 0, 0, b"", b"")
        return [(model.keys(0), model.values(0)) for _ in range(geometry.layers)]
    place, bits = (0, 0), [(bytearray(), bytearray()) for _ in range(geometry.layers)]
    for one in responses:
        assert (one.total, one.dtype) == (total, geometry.dtype)
        assert (one.layer, one.token_offset) == place and one.tokens >= 1
        assert one.tokens == 1 or len(one.k) + len(one.v) <= LARGEST_CHUNK
        for data, rows, dim in zip(bits[one.layer], (one.k, one.v), (geometry.head_dim, geometry.head_dim_v)):
            assert len(rows) == one.tokens * geometry.heads_kv * dim * model.dtype.itemsize
            data += rows
        end = one.token_offset + one.tokens
        assert end <= total
        place = (one.layer, end) if end < total else (one.layer + 1, 0)
    assert place == (geometry.layers, 0)
    return [
        (
            np.frombuffer(k, model.dtype).reshape(total, geometry.heads_kv, geometry.head_dim),
            np.frombuffer(v, model.dtype).reshape(total, geometry.heads_kv, geometry.head_dim_v),
        )
        for k, v in bits
    ]


def export(model, handle, position=0, tokens=0):
    return join(model, model.api.call("ExportKv", request(handle, position, tokens)))


def check_same(got, wanted):
    """[(k, v)] a layer, bitwise."""
    for layer, (got_rows, wanted_rows) in enumerate(zip(got, wanted, strict=True)):
        for name, one, other in zip("kv", got_rows, wanted_rows):
            assert one.shape == other.shape, (layer, name, one.shape, other.shape)
            if one.tobytes() != other.tobytes():
                kind = f"u{one.dtype.itemsize}"
                differs = np.ascontiguousarray(one).view(kind) != np.ascontiguousarray(other).view(kind)
                raise AssertionError(f"{name} of layer {layer} differs at {np.argwhere(differs)[:5].tolist()}")


def check_export(model, handle, position=0, tokens=0):
    """The range is what the mirror has."""
    stop = position + tokens if tokens else None
    wanted = [(k[position:stop], v[position:stop]) for k, v in model.stored[handle]]
    check_same(export(model, handle, position, tokens), wanted)


def append_rows(model, handle, rows):
    model.api.call("AppendKv", list(model.append_messages(handle, rows)))
    model.grow(handle, rows)


def copy_of(model, handle, **where):
    """A new sequence with what `handle` exports."""
    (copy,) = model.open(**where)
    append_rows(model, copy, export(model, handle))
    return copy


GEOMETRIES = {
    "bf16": {"dtype": "bf16"},
    "fp16": {"dtype": "fp16"},
    "fp32": {},
    "wide": {"dtype": "bf16", "layers": 3, "heads_q": 8, "heads_kv": 8, "head_dim": 128, "head_dim_v": 128},
}


@pytest.fixture(params=GEOMETRIES)
def each(request, shared_server):
    return Model(shared_server(**GEOMETRIES[request.param]).api())


# What comes back


def test_what_is_exported_is_what_was_appended(each):
    row = each.geometry.heads_kv * (each.geometry.head_dim + each.geometry.head_dim_v) * each.dtype.itemsize
    (handle,) = each.open_filled([int(LARGEST_CHUNK) // row + 1])
    each.append(handle, 30, chunk=7)
    each.step([handle], [20])
    responses = each.api.call("ExportKv", request(handle))
    assert len(responses) > each.geometry.layers  # more than one chunk a layer
    check_same(join(each, responses), each.stored[handle])


def test_every_bit_pattern_comes_back(each):
    """NaNs with their payload, infinities, subnormals, negative zeros."""
    (handle,) = each.open()
    rows = [
        tuple(np.frombuffer(each.random.bytes(array.nbytes), each.dtype).reshape(array.shape) for array in layer)
        for layer in each.rows(37)
    ]
    append_rows(each, handle, rows)
    check_export(each, handle)


def test_a_copy_decodes_to_the_same_bits_and_exports_them_again(each):
    (handle,) = each.open_filled([700])
    copy = copy_of(each, handle)
    check_same(export(each, copy), each.stored[handle])
    layers, opts = each.layers(3), options(batch_invariant=True, return_lse=True)
    first, second = (each.step([one], [3], opts=opts, layers=layers) for one in (handle, copy))
    for one, other in zip(first, second, strict=True):
        assert (one.raw_out, one.response.lse) == (other.raw_out, other.response.lse)
    check_same(export(each, copy), export(each, handle))
    check_export(each, copy)


@pytest.mark.parametrize("placement", [WHOLE, SPREAD], ids=["whole", "spread"])
def test_any_range_of_a_sequence(shared_server, placement):
    model = Model(shared_server(ranks=3).api())
    (handle,) = model.open_filled([100], placement)
    for start in (0, 1, 15, 16, 17, 47, 48, 99):
        for stop in (1, 15, 16, 17, 33, 48, 64, 99, 100):
            if start < stop:
                check_export(model, handle, start, stop - start)
        check_export(model, handle, start)


def test_an_empty_range_is_one_response_without_a_chunk(shared_server):
    model = Model(shared_server(ranks=3).api())
    for placement in (WHOLE, SPREAD):
        empty, some = model.open_filled([0, 32], placement)
        for handle, position in ((empty, 0), (some, 32)):
            assert [len(k) for k, _ in export(model, handle, position)] == [0] * model.geometry.layers
        model.truncate(some, 0)
        check_export(model, some)


def test_a_spread_sequence_comes_in_the_order_of_its_tokens(shared_server):
    model = Model(shared_server(ranks=3).api())
    (handle,) = model.open_filled([2000], SPREAD)
    model.append(handle, 700, chunk=300)
    model.step([handle], [50])
    assert all(rank.tokens > 0 for rank in model.api.info().ranks)
    check_export(model, handle)
    for position, tokens in ((0, 512), (511, 2), (512, 512), (1000, 600), (1535, 2), (1536, 1), (2047, 700), (2749, 1)):
        check_export(model, handle, position, tokens)
    for where in ({"placement": WHOLE}, {"placement": SPREAD}):
        check_same(export(model, copy_of(model, handle, **where)), model.stored[handle])


@pytest.mark.parametrize("placement", [WHOLE, SPREAD], ids=["whole", "spread"])
def test_a_fork_exports_its_parents_tokens_and_its_own(shared_server, placement):
    model = Model(shared_server(ranks=3).api())
    (parent,) = model.open_filled([1100], placement)
    child, sibling = model.fork(parent, 1090), model.fork(parent, 600)
    check_export(model, child)
    model.step([child, parent, sibling], [5, 3, 20])
    model.append(sibling, 600)
    for handle in (child, parent, sibling):
        check_export(model, handle)
        check_export(model, handle, 585, 33)
    model.close([parent])
    check_export(model, child)
    check_export(model, sibling)


def test_what_was_rolled_back_is_not_exported(model):
    (handle,) = model.open_filled([50])
    model.truncate(handle, 21)
    check_export(model, handle)
    model.step([handle], [10])
    check_export(model, handle)
    check_export(model, handle, 15, 16)


def test_an_export_during_a_step_or_an_upload_has_the_committed_tokens(model):
    (handle,) = model.open_filled([20])
    layers = model.layers(5)
    first = model.api.call("Decode", model.decode_request([handle], [5], layers[0]))
    check_export(model, handle)
    assert model.api.error("ExportKv", request(handle, 20, 1)).code() == CODE.INVALID_ARGUMENT
    assert model.api.call("Decode", pb.DecodeRequest(step=first.step, layer=1, **layers[1].fields())).committed
    model.grow(handle, [(layer.k, layer.v) for layer in layers])
    check_export(model, handle)

    rows = model.rows(40)
    messages = list(model.append_messages(handle, rows, chunk=8))
    seen = []

    def slowly():
        yield from messages[:-1]
        seen.append(export(model, handle))
        yield messages[-1]

    model.api.method("AppendKv")(slowly(), timeout=TIMEOUT_S)
    check_same(seen[0], model.stored[handle])
    model.grow(handle, rows)
    check_export(model, handle)


def test_steps_go_on_while_a_sequence_is_exported(model):
    (handle,) = model.open_filled([3000])
    before = list(model.stored[handle])
    call = model.api.export(handle)
    responses = [next(call)]
    for _ in range(3):
        model.step([handle], [16])
    responses += call
    check_same(join(model, parsed(responses)), before)
    check_export(model, handle)


# What is stored in fp8


@pytest.mark.parametrize("placement", [WHOLE, SPREAD], ids=["whole", "spread"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_fp8_exports_what_it_means_and_a_copy_stores_the_same(fp8, dtype, placement):
    model = fp8(dtype=dtype, ranks=3)
    (handle,) = model.open_filled([600], placement)
    model.step([handle], [7])
    exported = export(model, handle)
    unit = {"bf16": 2.0**-8, "fp16": 2.0**-11}[dtype]
    for number, (rows, sent) in enumerate(zip(exported, model.stored[handle], strict=True)):
        for got, one, scales in zip(rows, sent, (model.k_scales, model.v_scales)):
            meant = fp8_meant(one, scales[number])
            np.testing.assert_allclose(got.astype(np.float64), meant, rtol=1.01 * unit, atol=1e-7)
    copies = [handle]
    for where in (WHOLE, SPREAD):
        copies.append(copy_of(model, copies[-1], placement=where))
        check_same(export(model, copies[-1]), exported)
    layer, opts = model.layer(1, read_only=True), options(batch_invariant=True)
    answers = {model.read([one], opts=opts, layer=layer, check=False).raw_out for one in copies}
    assert len(answers) == 1
    check_same(export(model, handle, 505, 20), [(k[505:525], v[505:525]) for k, v in exported])


# Errors


def expect(error, code, word):
    assert error.code() == code and word in error.details(), f"{error.code()}: {error.details()}"


def test_an_unknown_or_closed_sequence_is_not_found(model):
    (handle,) = model.open_filled([20])
    for wrong in (0, 2**64 - 1, handle ^ 1 << 40):
        expect(model.api.error("ExportKv", request(wrong)), CODE.NOT_FOUND, "sequence: ")
    model.close([handle])
    expect(model.api.error("ExportKv", request(handle)), CODE.NOT_FOUND, "sequence: ")


@pytest.mark.parametrize("placement", [WHOLE, SPREAD], ids=["whole", "spread"])
def test_a_range_beyond_the_end_is_refused_by_its_field(model, placement):
    (handle,) = model.open_filled([20], placement)
    huge = 2**64 - 1
    for position, tokens in ((21, 0), (21, 1), (huge, 0), (huge, 1), (huge, huge), (2**32, 1), (2**63, 2**63)):
        expect(model.api.error("ExportKv", request(handle, position, tokens)), CODE.INVALID_ARGUMENT, "position")
    for position, tokens in ((0, 21), (20, 1), (19, 2), (5, huge - 4), (1, huge), (0, huge), (0, 2**32 + 1)):
        expect(model.api.error("ExportKv", request(handle, position, tokens)), CODE.INVALID_ARGUMENT, "tokens")
    check_export(model, handle)
    model.step([handle])


# Pages are held as long as a call needs them, and no longer


def fill(model, tokens=512):
    """Appends to new sequences until no page is free."""
    full = set()
    ranks = range(len(model.api.info().ranks))
    while len(full) < len(ranks):
        for rank in set(ranks) - full:
            (handle,) = model.open(placement=pb.PLACEMENT_EXPLICIT, dp_rank=rank)
            try:
                model.append(handle, tokens)
            except grpc.RpcError as error:
                assert error.code() == CODE.RESOURCE_EXHAUSTED, error
                full.add(rank)


@pytest.fixture
def small(shared_server):
    """4096 tokens on each of two ranks."""
    return Model(shared_server(pages=256).api())


@pytest.mark.parametrize("placement", [WHOLE, SPREAD], ids=["whole", "spread"])
def test_a_range_is_held_whatever_becomes_of_the_sequence(small, placement):
    tokens = 4000 if placement == WHOLE else 7500
    (handle,) = small.open_filled([tokens], placement)
    before = list(small.stored[handle])
    call = small.api.export(handle)
    responses = [next(call)]
    small.truncate(handle, 5)
    small.append(handle, 20)
    small.close([handle])
    fill(small)
    expect(small.api.error("ExportKv", request(handle)), CODE.NOT_FOUND, "sequence: ")
    responses += call
    check_same(join(small, parsed(responses)), before)
    small.close(list(small.stored))
    small.api.assert_all_free()


def test_a_range_of_a_fork_is_held(small):
    (parent,) = small.open_filled([4000])
    child = small.fork(parent, 3990)
    before = list(small.stored[child])
    call = small.api.export(child)
    responses = [next(call)]
    small.step([child], [9])  # into what was a shared page
    small.close([parent, child])
    fill(small)
    responses += call
    check_same(join(small, parsed(responses)), before)


def leave_by_cancel(call, api, proxy):
    call.cancel()


def leave_by_closing_the_channel(call, api, proxy):
    api.close()


def leave_by_losing_the_connection(call, api, proxy):
    proxy.cut()


@pytest.mark.parametrize("leave", [leave_by_cancel, leave_by_closing_the_channel, leave_by_losing_the_connection])
@pytest.mark.parametrize("read", [0, 1, 3])
def test_a_client_that_leaves_midway_leaves_nothing_behind(shared_server, leave, read):
    server = shared_server(pages=256)
    model = Model(server.api())
    whole, spread = model.open_filled([3000]) + model.open_filled([2500], SPREAD)
    proxy = Proxy(server.address)
    api = server.api(proxy.address)
    calls = [api.export(handle) for handle in (whole, spread, whole)]
    for call in calls:
        for _ in range(read):
            next(call)
    model.close([whole])
    for call in calls:
        leave(call, api, proxy)
    model.step([spread])
    check_export(model, spread, 2400)
    model.close([spread])
    model.api.assert_all_free()
    for call in calls:
        call.cancel()
    proxy.close()


def test_many_exports_at_the_same_time(small):
    handles = small.open_filled([1000, 1500]) + small.open_filled([1700], SPREAD)
    calls = [(handle, small.api.export(handle, position)) for handle in handles for position in (0, 3, 600)]
    for (handle, call), position in zip(calls, [0, 3, 600] * 3):
        wanted = [(k[position:], v[position:]) for k, v in small.stored[handle]]
        check_same(join(small, parsed(call)), wanted)
