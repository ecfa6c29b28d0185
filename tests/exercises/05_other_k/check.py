import torch

import dust


def test_the_evaluation_shows_k_candidates_at_a_time(tmp_path, capsys, monkeypatch):
    """A run whose answers are cut off before a program, for speed: they are in the groups all the same."""
    torch.set_num_threads(1)
    reported = {}
    monkeypatch.setattr(dust.report, "write_report",
                        lambda rows, finals, *_: reported.update(rows=rows, finals=finals) or "")
    arguments = ["--eval-only", "--eval-limit", 3, "--repeats", 2, "--group-size", 2, "--max-new-tokens", 8]
    assert dust.main([str(a) for a in [*arguments, "--workers", 1, "--out", tmp_path]]) == 0
    assert [len(one.ranked) for one in reported["rows"]["base"]] == [2] * 6
    assert [len(one.ranked) for one in reported["finals"]["base"]] == [2] * 3
    assert "3 problems x 2 x 2 candidates" in capsys.readouterr().out  # the plan says it, too
