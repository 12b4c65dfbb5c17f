"""Forks of one prompt in one step: the prefix is read once for all of them, and every answer is the oracle's."""

import pytest
from attention_oracle import Model, options
from attnd_harness import pb

CHUNK = 512  # prefixes are shared in whole chunks


def tokens_shared(server):
    """Tokens that need not be read, counted for every layer, over all ranks and since the server's start."""
    return server.metric("attnd_rank_prefix_tokens_shared_total")


def family(model, length=1100):
    """A prompt, and forks of it: at its end, at borders of pages and chunks, in its last page, and shortened since."""
    [parent] = model.open_filled([length])
    forks = [model.fork(parent, at) for at in (length, 2 * CHUNK, 2 * CHUNK + 6, length)]
    model.truncate(forks[-1], CHUNK + 30)
    return [parent, *forks]


@pytest.mark.parametrize("via", ["unary", "stream"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_steps_of_forks_match_float64(shared_server, dtype, via):
    server = shared_server(dtype=dtype)
    model = Model(server.api())
    handles = family(model)
    before = tokens_shared(server)
    model.step(handles, via=via, opts=options(return_lse=True))
    saved = 3 * 2 * CHUNK  # four share two chunks, which is more than one chunk of all five
    assert tokens_shared(server) - before == saved * model.geometry.layers
    model.step(handles[::-1], [1, 5, 2, 1, 3], via=via)
    for number in range(model.geometry.layers):
        model.read(handles, [2, 1, 1, 4, 1], number=number, opts=options(return_lse=True))
    assert tokens_shared(server) - before == 3 * saved * model.geometry.layers
    model.check_lengths()


def test_steps_of_forks_match_float64_over_fp8(fp8):
    model = fp8()
    handles = family(model)
    model.step(handles, [1, 2, 1, 1, 1], opts=options(return_lse=True))
    model.read(handles, opts=options(return_lse=True))


@pytest.mark.parametrize(
    "opts",
    [{"softcap": 3.0}, {"sinks": [0.5, -3.0, 8.0, 0.0]}, {"softmax_scale": 0.2, "softcap": 5.0, "sinks": [1, 2, 3, 4]}],
    ids=["softcap", "sinks", "both"],
)
def test_options_mean_the_same_for_forks(model, opts):
    handles = family(model)
    model.step(handles, [1, 4, 1, 2, 1], opts=options(return_lse=True, **opts))
    model.read(handles, opts=options(return_lse=True, **opts))


@pytest.mark.parametrize("opts", [{"batch_invariant": True}, {"sliding_window": 700}], ids=["invariant", "window"])
def test_nothing_is_shared_where_it_may_not_be(server, model, opts):
    handles = family(model)
    before = tokens_shared(server)
    together = model.read(handles, opts=options(return_lse=True, **opts)).outs
    assert tokens_shared(server) == before
    assert len(together) == len(handles)


def test_two_families_and_strangers_in_one_step(server, model):
    first, second = family(model), family(model, 600 + 2 * CHUNK)
    strangers = model.open_filled([0, 900, 17])
    handles = [one for trio in zip(first, second, [*strangers, None, None], strict=True) for one in trio if one]
    before = tokens_shared(server)
    model.step(handles, opts=options(return_lse=True))
    assert tokens_shared(server) - before == 2 * 3 * 2 * CHUNK * model.geometry.layers


def test_spread_forks_are_beside_whole_ones(shared_server):
    model = Model(shared_server(ranks=2).api())
    [spread] = model.open_filled([1500], pb.PLACEMENT_SPREAD)
    handles = [spread, *family(model), model.fork(spread, 1400)]
    model.step(handles, opts=options(return_lse=True))
    model.read(handles, opts=options(return_lse=True))


def test_a_fork_that_outgrows_its_family_still_shares_with_it(server, model):
    handles = family(model)
    model.append(handles[1], 700)
    model.close(handles[:1])
    before = tokens_shared(server)
    model.step(handles[1:])
    assert tokens_shared(server) - before == 2 * 2 * CHUNK * model.geometry.layers
