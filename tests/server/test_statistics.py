from instep.server.statistics import Statistics


def test_the_split_is_over_the_last_blocks_in_microseconds() -> None:
    statistics = Statistics()
    assert statistics.snapshot()["queue_us_p99"] == 0.0
    for index in range(5000):
        statistics.answered([1000 * index], compute_ns=2_000_000, send_ns=3000)
    values = statistics.snapshot()
    assert values["blocks_total"] == 5000
    assert values["compute_us_p50"] == values["compute_us_p99"] == 2000.0
    assert values["send_us_p50"] == 3.0
    assert values["queue_us_p50"] == 904 + (4096 - 1) / 2


def test_each_block_of_a_message_counts_with_its_own_wait() -> None:
    statistics = Statistics()
    statistics.answered([1000, 2000, 9000], compute_ns=1000, send_ns=0)
    values = statistics.snapshot()
    assert (values["blocks_total"], values["queue_us_p50"]) == (3, 2.0)


def test_the_mean_batch_counts_frames_over_batches() -> None:
    statistics = Statistics()
    statistics.frames_total, statistics.batches_total = 30, 4
    assert statistics.snapshot()["batch_size_mean"] == 7.5
