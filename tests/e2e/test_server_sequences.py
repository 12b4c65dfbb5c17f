"""Sequences: open, place, fork, truncate, describe, close; and AppendKv uploads."""

import grpc
import numpy as np
import pytest
from attention_oracle import Model, options
from attnd_harness import CODE, TIMEOUT_S, pb


def pages_free(api):
    return [rank.pages_free for rank in api.info().ranks]


def pages_used(api):
    return sum(rank.pages_total - rank.pages_free for rank in api.info().ranks)


def test_server_info_tells_the_geometry_the_ranks_and_the_limits(server, api):
    info = api.info()
    flags = server.flags
    geometry = info.geometry
    assert (geometry.layers, geometry.heads_q, geometry.heads_kv) == (
        flags["layers"],
        flags["heads_q"],
        flags["heads_kv"],
    )
    assert (geometry.head_dim, geometry.head_dim_v) == (flags["head_dim"], flags["head_dim_v"])
    assert geometry.dtype == pb.DTYPE_FP32 and geometry.page_size == flags["page_size"]
    assert [rank.rank for rank in info.ranks] == list(range(flags["ranks"]))
    for rank in info.ranks:
        assert rank.state == pb.RANK_STATE_SERVING and rank.device
        assert rank.pages_total == flags["pages"]
    assert info.version and info.instance and info.backend == flags["backend"] and info.backend_detail
    assert info.limits.batch == flags["max_batch"] and info.limits.query_length == 128
    assert info.limits.message_bytes > 0 and info.limits.sequences == flags["max_sequences"]
    assert info.uptime_ms > 0 and not info.draining


def test_two_servers_have_different_instances(shared_server):
    assert shared_server().api().info().instance != shared_server(ranks=1).api().info().instance


def test_handles_are_distinct_and_never_zero(api):
    handles = api.open(500)
    assert len(set(handles)) == 500 and 0 not in handles
    api.close_sequences(handles)
    again = api.open(500)
    assert not set(again) & set(handles)


def test_round_robin_goes_over_all_ranks(shared_server):
    api = shared_server(ranks=4).api()
    response = api.call("OpenSequences", pb.OpenSequencesRequest(count=8, placement=pb.PLACEMENT_ROUND_ROBIN))
    api.open_handles.update(response.sequences)
    start = response.dp_ranks[0]
    assert list(response.dp_ranks) == [(start + i) % 4 for i in range(8)]


def test_an_explicit_rank_is_obeyed(shared_server):
    model = Model(shared_server(ranks=4).api())
    for rank in range(4):
        handles = model.open_filled([20, 40], pb.PLACEMENT_EXPLICIT, rank)
        assert [info.dp_rank for info in model.api.describe(handles)] == [rank, rank]
        assert model.api.info().ranks[rank].tokens == 60


def test_least_tokens_fills_the_emptiest_rank(shared_server):
    model = Model(shared_server(ranks=4).api())
    for rank, tokens in enumerate([300, 200, 10, 100]):
        model.open_filled([tokens], pb.PLACEMENT_EXPLICIT, rank)
    homes = []
    for tokens in (50, 60, 100):
        (handle,) = model.open_filled([tokens])
        homes.append(model.api.describe([handle])[0].dp_rank)
    # 10 + 50 = 60 is still the least; then rank 3 (100) against rank 2 (120).
    assert homes == [2, 2, 3]


def test_empty_sequences_go_to_different_ranks(shared_server):
    api = shared_server(ranks=4).api()
    api.open(8)
    assert [rank.sequences for rank in api.info().ranks] == [2, 2, 2, 2]


def test_a_spread_sequence_has_its_tokens_on_every_rank(shared_server):
    model = Model(shared_server(ranks=4).api())
    (handle,) = model.open_filled([512 * 3 + 100], pb.PLACEMENT_SPREAD)
    info = model.api.describe([handle])[0]
    assert info.spread and info.length == 1636
    tokens = sorted(rank.tokens for rank in model.api.info().ranks)
    assert tokens == [100, 512, 512, 512]
    assert info.pages == 3 * 32 + 7


def test_describe_counts_pages_and_length(model):
    handles = model.open_filled([0, 1, 16, 17])
    assert [
        (info.length, info.pages, info.shared_pages, info.busy, info.spread) for info in model.api.describe(handles)
    ] == [
        (0, 0, 0, False, False),
        (1, 1, 0, False, False),
        (16, 1, 0, False, False),
        (17, 2, 0, False, False),
    ]
    assert model.api.describe([]) == []


def test_describe_keeps_request_order_and_repeats(model):
    handles = model.open_filled([1, 2, 3])
    order = [handles[2], handles[0], handles[2]]
    assert [info.sequence for info in model.api.describe(order)] == order
    assert [info.length for info in model.api.describe(order)] == [3, 1, 3]


def test_closing_nothing_is_fine(api):
    api.close_sequences([])


def test_closing_frees_the_pages(model):
    free = pages_free(model.api)
    handles = model.open_filled([100, 33, 1])
    assert pages_free(model.api) != free
    model.close(handles)
    assert pages_free(model.api) == free


# Fork


@pytest.mark.parametrize("placement", [pb.PLACEMENT_LEAST_TOKENS, pb.PLACEMENT_SPREAD])
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 600, 1100])
def test_forks_share_a_prefix_and_then_diverge(shared_server, placement, length):
    model = Model(shared_server(ranks=4).api())
    (parent,) = model.open_filled([1100], placement)
    child = model.fork(parent, length)
    sibling = model.fork(parent, length)
    home = model.api.describe([parent])[0].dp_rank
    assert [info.dp_rank for info in model.api.describe([child, sibling])] == [home, home]
    model.check_lengths()
    # All three write to what was one partial page; each must see its own rows only.
    for _ in range(2):
        model.step([child, parent, sibling], [3, 1, 2], opts=options(return_lse=True))
    model.read([parent, child, sibling])
    model.check_lengths()


def test_a_fork_takes_no_pages_until_it_is_written(model):
    (parent,) = model.open_filled([100])
    used = pages_used(model.api)
    children = [model.fork(parent, 100) for _ in range(10)]
    assert pages_used(model.api) == used
    infos = model.api.describe([parent, *children])
    assert all(info.pages == 7 and info.shared_pages == 7 for info in infos)
    model.step([children[0]])
    assert pages_used(model.api) == used + 1


def test_a_fork_outlives_its_parent(model):
    (parent,) = model.open_filled([50])
    child = model.fork(parent, 40)
    model.close([parent])
    model.read([child])
    model.step([child], [20])
    model.check_lengths()


def test_forks_of_forks(model):
    (first,) = model.open_filled([37])
    chain = [first]
    for length in (36, 33, 32, 20, 5):
        chain.append(model.fork(chain[-1], length))
        model.step([chain[-1]], [4])
        chain.append(model.fork(chain[-1], model.length(chain[-1])))
    model.step(chain)
    model.read(chain)


def test_writing_to_a_parent_does_not_change_its_forks(model):
    (parent,) = model.open_filled([20])
    child = model.fork(parent, 18)
    model.step([parent], [10])
    model.append(parent, 30)
    model.read([child, parent])


def test_a_fork_taken_during_a_step_of_its_parent_sees_committed_tokens_only(model):
    (parent,) = model.open_filled([17])
    layers = model.layers(5)
    first = model.api.call("Decode", model.decode_request([parent], [5], layers[0]))
    try:
        child = model.fork(parent, 17)
    except grpc.RpcError as error:
        assert error.code() == CODE.ABORTED
        child = None
    second = model.api.call("Decode", pb.DecodeRequest(step=first.step, layer=1, **layers[1].fields()))
    assert second.committed
    model.grow(parent, [(layer.k, layer.v) for layer in layers])
    model.read([parent])
    if child:
        model.read([child])
        model.step([child, parent], [3, 3])


# Truncate


@pytest.mark.parametrize("placement", [pb.PLACEMENT_LEAST_TOKENS, pb.PLACEMENT_SPREAD])
@pytest.mark.parametrize("length", [0, 1, 16, 31, 512, 513, 1299, 1300])
def test_truncate_rolls_back_and_frees_pages(shared_server, placement, length):
    model = Model(shared_server(ranks=4).api())
    (handle,) = model.open_filled([1300], placement)
    model.truncate(handle, length)
    assert pages_used(model.api) == -(-length // 16)
    model.read([handle], opts=options(return_lse=True))
    model.step([handle], [20], opts=options(return_lse=True))
    model.check_lengths()


def test_truncating_a_fork_leaves_the_parent(model):
    (parent,) = model.open_filled([64])
    child = model.fork(parent, 60)
    model.truncate(child, 10)
    model.step([child], [30])
    model.read([parent, child])


def test_speculative_decoding_by_steps_and_truncation(model):
    handles = model.open_filled([30, 47])
    for accepted in (1, 4, 2, 3):
        before = [model.length(handle) for handle in handles]
        model.step(handles, [4, 4])
        for handle, length in zip(handles, before, strict=True):
            model.truncate(handle, length + accepted)
    model.read(handles)
    model.check_lengths()


# AppendKv


@pytest.mark.parametrize("placement", [pb.PLACEMENT_LEAST_TOKENS, pb.PLACEMENT_SPREAD])
@pytest.mark.parametrize("chunk", [1, 7, 16, 100, 513, 5000])
def test_uploads_in_chunks_of_any_size_and_layers_in_any_order(shared_server, placement, chunk):
    model = Model(shared_server(ranks=4).api())
    (handle,) = model.open(placement=placement)
    tokens = 60 if chunk == 1 else 1050
    model.append(handle, tokens, chunk=chunk, layer_order=[1, 0])
    model.append(handle, tokens // 3, chunk=chunk)
    for number in range(2):
        model.read([handle], number=number, opts=options(return_lse=True))


def test_the_layers_of_an_upload_may_interleave(model):
    (handle,) = model.open_filled([5])
    rows = model.rows(90)
    begin, *chunks = model.append_messages(handle, rows, chunk=30)
    order = [3, 0, 1, 4, 2, 5]  # layer 1's first, layer 0's first two, ...
    response = model.api.call("AppendKv", [begin, *[chunks[i] for i in order]])
    assert response.length == 95
    model.grow(handle, rows)
    model.read([handle], number=0)
    model.read([handle], number=1)


def test_the_first_message_of_an_upload_may_carry_a_chunk(model):
    (handle,) = model.open()
    rows = model.rows(20)
    begin, *chunks = model.append_messages(handle, rows)
    chunks[0].begin.CopyFrom(begin.begin)
    assert model.api.call("AppendKv", chunks).length == 20
    model.grow(handle, rows)
    model.read([handle])


def test_an_upload_is_invisible_until_it_is_complete(model):
    (handle,) = model.open_filled([10])
    rows = model.rows(40)
    messages = list(model.append_messages(handle, rows, chunk=8))
    seen = []

    def slowly():
        for i, message in enumerate(messages):
            yield message
            if i == len(messages) - 1:
                # Reads go on as if there were no upload.
                seen.append(model.api.describe([handle])[0].length)
                model.read([handle])

    response = pb.AppendKvResponse.FromString(model.api.method("AppendKv")(slowly(), timeout=TIMEOUT_S))
    assert seen == [10] and response.length == 50
    model.grow(handle, rows)
    model.read([handle])


def test_an_incomplete_upload_is_refused_and_changes_nothing(model):
    (handle,) = model.open_filled([10])
    free = pages_free(model.api)
    rows = model.rows(40)
    messages = list(model.append_messages(handle, rows, chunk=20))
    for some, naming in (
        (messages[:1], "layer"),  # nothing at all
        (messages[:3], "layer"),  # layer 0 only
        (messages[:-1], "layer"),  # half of layer 1
    ):
        error = model.api.error("AppendKv", some)
        assert error.code() == CODE.INVALID_ARGUMENT and naming in error.details()
    model.check_lengths()
    assert pages_free(model.api) == free
    model.append(handle, 40)
    model.read([handle])


def test_uploads_of_several_sequences_run_at_the_same_time(model):
    handles = model.open(8)
    rows = {handle: model.rows(333) for handle in handles}
    calls = [
        model.api.future("AppendKv", list(model.append_messages(handle, rows[handle], chunk=50))) for handle in handles
    ]
    for handle, call in zip(handles, calls, strict=True):
        assert pb.AppendKvResponse.FromString(call.result()).length == 333
        model.grow(handle, rows[handle])
    model.step(handles)


def test_a_large_upload_in_one_message(shared_server):
    model = Model(
        shared_server(ranks=1, layers=1, heads_q=8, heads_kv=8, head_dim=128, head_dim_v=128, pages=256).api()
    )
    (handle,) = model.open()
    model.append(handle, 2000)  # 8 MiB of k, 8 MiB of v
    answer = model.read([handle], [64])
    assert np.isfinite(answer.outs[0]).all()
