"""Parts of a kernel's work in threads: every part once, errors told, and also after a fork."""

import multiprocessing
import threading

import pytest
import torch

from strategies.common.kernel_threads import in_threads


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_part_is_done_once_when_it_returns(threads):
    done = []
    in_threads(done.append, range(50))
    assert sorted(done) == list(range(50))


def test_as_many_threads_as_torch_has_work_at_once(threads):
    together = threading.Barrier(threads)
    in_threads(lambda _: together.wait(30), range(threads))  # one thread too few would wait for ever


def test_an_error_is_told_after_the_others_are_done(threads):
    done = []

    def work(part):
        if part == 0:
            raise KeyError(part)
        done.append(part)

    with pytest.raises(KeyError):
        in_threads(work, range(20))
    before = list(done)
    in_threads(lambda part: None, range(20))
    assert done == before  # nothing of the first call still runs


def _in_child(sender):
    done = []
    in_threads(done.append, range(9))
    sender.send(sorted(done))


def test_threads_are_a_process_own_after_a_fork(threads):
    """Those of the parent are not there: work given to them would never be done."""
    in_threads(lambda part: None, range(9))
    receiver, sender = multiprocessing.Pipe(False)
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(sender,))
    child.start()
    assert receiver.poll(60) and receiver.recv() == list(range(9))
    child.join()
