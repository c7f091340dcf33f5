"""All ranks run an op the same way: in processes of their own, over gloo."""

from __future__ import annotations

import choice_jobs as jobs
import pytest
import ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    work = {
        "one fails": (jobs.one_fails, 3),
        "all work": (jobs.all_work, 3),
        "some without a device": (jobs.some_without_a_device, 3),
    }
    found = ranks.launch(work, tmp_path_factory.mktemp("ranks"), limit=250.0)
    for name, results in found.items():
        for rank, result in enumerate(results):
            assert not isinstance(result, Exception), f"{name}, rank {rank}: {result.trace}"
    return found


def test_what_fails_on_one_rank_no_rank_runs(found):
    results = found["one fails"]
    for rank, result in enumerate(results):
        reason = "wrong result" if rank == 1 else "another rank takes torch"
        assert result["chosen"] == {"basis": "triton", "commit_": f"torch: {reason}", "accumulate_": "triton"}
    assert [len(result["warnings"]) for result in results] == [0, 1, 0], "the rank that it happens on says so"


def test_where_every_kernel_works_nothing_is_sent(found):
    for result in found["all work"]:
        assert set(result["chosen"].values()) == {"triton"} and result["bytes"] == 0


def test_ranks_without_a_device_do_not_hold_the_others_up(found):
    first, second, third = found["some without a device"]
    assert first["chosen"]["basis"] == "torch: no compiler" and second["chosen"]["basis"].startswith("torch: another")
    assert third["chosen"] is None
    assert {result["bytes"] for result in (first, second, third)} == {8 * len(jobs.OPS)}
