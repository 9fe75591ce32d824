from engine import stages


def test_a_stage_inside_another_counts_for_itself(monkeypatch):
    now = iter((0.0, 1.0, 3.0, 7.0, 10.0, 10.5))
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(now))
    own = stages.Stages(measures=True)
    with own.stage("outer"), own.stage("inner"):
        pass
    with own.stage("outer"):
        pass
    assert own.take() == {"inner": 2.0, "outer": 5.0 + 0.5}
    assert own.take() == {}


def test_nothing_is_measured_where_it_would_mean_nothing():
    own = stages.Stages(measures=False)
    with own.stage("forward"):
        pass
    assert own.take() == {}
