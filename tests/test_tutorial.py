"""The tutorial cannot rot: its code runs, its numbers are what the code gives, its excerpts are the source.

Conventions of tutorial.md:
- A ```python block runs, all of them in one namespace from top to bottom. A line that ends in `# -> VALUE` is an
  expression with that value, rounded to the decimals that are written.
- One whose first line is `# from MODULE.NAME(): to read, not to paste` is a part of that source instead, word for word;
  a line "..." leaves some out. The mark is a line of the block, because a page does not show the words behind ```.
- A ```text block whose first line is `# printed by a quick run` is what it says.
- `name()`, `module.name()` and `--option` exist.
- In the sections CHECKED, a decimal number or a percentage in the text is a value or a number of some block, or the
  default of an option.
- What stands between <!-- results: NAME --> and <!-- end --> comes from data/results/NAME.md: `fill`. After a study,
  `python tests/test_tutorial.py` writes it anew.
"""
import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

import dust  # noqa: E402
from plumbing import report  # noqa: E402

TUTORIAL, RESULTS = ROOT / "tutorial.md", ROOT / "data" / "results"
TEXT = TUTORIAL.read_text(encoding="utf-8")
STUDIES = ("table2", "table3", "figure3", "figure4", "transfer", "teacher", "strength", "noise")
NOT_YET = "not yet measured"
CHECKED = ("Section 2.2", "Section 2.3", "Section 2.4", "Section 2.1", "What goes wrong", "What it costs")
MODULES = ["dust", "grpo", "rank_prompt", "sandbox"]
MODULES += sorted(f"{path.parent.name}.{path.stem}" for folder in ("plumbing", "data")
                  for path in (ROOT / folder).glob("*.py") if path.stem != "__init__")

# -------------------------------------------------------------------------------------------------------- reading it


def fences(text: str, info: str) -> list[str]:
    """The bodies of all fenced blocks whose first line is ```info."""
    return re.findall(rf"^```{re.escape(info)}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


EXCERPT = re.compile(r"# from ([\w.]+)\(\): to read, not to paste\n")
PRINTED = "# printed by a quick run\n"


def runnable(text: str) -> list[str]:
    """The blocks that a reader pastes."""
    return [block for block in fences(text, "python") if not EXCERPT.match(block)]


def excerpts(text: str) -> list[tuple[str, str]]:
    """(name of the source, what is quoted of it)."""
    marked = [(EXCERPT.match(block), block) for block in fences(text, "python")]
    return [(found[1], block[found.end() :]) for found, block in marked if found]


def printed(text: str) -> list[str]:
    """What a quick run printed."""
    return [block.removeprefix(PRINTED) for block in fences(text, "text") if block.startswith(PRINTED)]


def section(text: str, title: str) -> str:
    """From a second-level heading that starts with title to the next one."""
    return re.search(rf"^## {re.escape(title)}.*?(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)[0]


def prose(text: str) -> str:
    """The text without fenced blocks, results and references to sections of the paper (§2.2)."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!-- results.*?<!-- end -->", "", text, flags=re.DOTALL)
    return re.sub(r"§\d(\.\d)?|^#.*", "", text, flags=re.MULTILINE)


# ------------------------------------------------------------------------------------------------ the code that runs


def plain(value):
    """Tensors and tuples as lists, dicts as lists of pairs, all the way down."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    value = list(value.items()) if isinstance(value, dict) else value
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def agrees(value, stated: str) -> bool:
    """Whether a value is the stated one: numbers to the decimals that are written, all else exactly."""
    decimals = max((len(digits) for digits in re.findall(r"\.(\d+)", stated)), default=0)

    def same(a, b) -> bool:
        if isinstance(b, list):
            return isinstance(a, list) and len(a) == len(b) and all(map(same, a, b))
        if isinstance(b, (bool, str)) or b is None:
            return type(a) is type(b) and a == b
        return isinstance(a, (int, float)) and not isinstance(a, bool) and abs(a - b) <= 0.501 * 10**-decimals

    return same(plain(value), plain(ast.literal_eval(stated)))


def run_block(block: str, namespace: dict) -> list[str]:
    """Runs a block; a line for each stated value that is another. A traceback has the lines of the tutorial."""
    lines, wrong, above = block.splitlines(), [], TEXT[: max(TEXT.find(block), 0)].count("\n")
    for node in ast.parse(block).body:
        stated = lines[node.end_lineno - 1].partition("# -> ")[2].strip()
        source = ast.get_source_segment(block, node)
        if isinstance(node, ast.Expr) and stated:
            value = eval(source, namespace)
            if not agrees(value, stated):
                wrong.append(f"{source}\n    is {plain(value)!r}\n    not {stated}")
        else:
            ast.increment_lineno(node, above)
            exec(compile(ast.Module([node], []), str(TUTORIAL), "exec"), namespace)
    assert block.count("# -> ") == sum(
        isinstance(node, ast.Expr) and "# -> " in lines[node.end_lineno - 1] for node in ast.parse(block).body
    ), f"a value is stated where no expression ends:\n{block}"
    return wrong


def test_every_code_block_runs_and_gives_what_it_states(monkeypatch):
    """A reader who pastes a block and gets another number stops trusting all of them."""
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    blocks, namespace, wrong = runnable(TEXT), {}, []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # what a reader pastes works next year too
            for block in blocks:
                wrong += run_block(block, namespace)
    finally:
        torch.set_num_threads(threads)
    assert len(blocks) > 20 and TEXT.count("# -> ") > 60
    assert not wrong, "\n".join(wrong)


def test_a_wrong_number_is_seen():
    for value, stated in ((0.7501, "0.75"), ([1, 2.0], "[1, 2]"), (torch.tensor([0.25, -1]), "[0.25, -1.00]"),
                          ("a", "'a'"), (True, "True"), (None, "None"), ((1, 0), "(1, 0)"), (4, "4")):
        assert agrees(value, stated), stated
    for value, stated in ((0.756, "0.75"), ([1, 2], "[1, 3]"), ([1], "[1, 1]"), ("b", "'a'"), (1, "True"),
                          (True, "1"), (0, "None"), (4, "5"), (-0.25, "0.25")):
        assert not agrees(value, stated), stated
    assert run_block("x = 2\nx + 1  # -> 3\n", {}) == [] and len(run_block("x = 2\nx + 1  # -> 4\n", {})) == 1
    with pytest.raises(AssertionError, match="no expression"):
        run_block("x = 2  # -> 2\n", {})


def numbers_of_the_code(text: str) -> set[float]:
    """Every number in a block that runs, stated or written; and the defaults of the options."""
    found = {abs(value) for value in vars(dust.Args()).values() if isinstance(value, float)} | {0.28}  # the release's
    for block in runnable(text):
        found |= {abs(float(number)) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?", block)}
    return found | measured(text)


def measured(text: str) -> set[float]:
    """The numbers that the real run printed."""
    return {float(number) for block in printed(text) for number in re.findall(r"\d+\.\d+", block)}


def unknown_numbers(text: str, allowed: set[float]) -> list[str]:
    text = prose(text)
    decimals = [n for n in re.findall(r"(?<![\w.,])\d+\.\d+", text) if float(n) not in allowed]
    shares = [n for n in re.findall(r"(\d+(?:\.\d+)?) %", text)
              if float(n) not in allowed and round(float(n) / 100, 6) not in allowed]
    return decimals + shares


@pytest.mark.parametrize("title", CHECKED)
def test_every_number_in_the_text_is_one_of_the_code(title):
    """0.92 in a sentence has to be seen in a block beside it, or it stays there when the code has moved on."""
    assert unknown_numbers(section(TEXT, title), numbers_of_the_code(TEXT)) == []


def test_an_unknown_number_is_seen():
    text = "## A\n§2.2 says 0.75, 98 % and\n\n```python\n1 - 0.25  # -> 0.75\n```\n\nthen 0.76 and 97 %.\n"
    assert unknown_numbers(text, numbers_of_the_code(text) | {0.98}) == ["0.76", "97"]


def test_measured_numbers_in_the_text_are_those_of_the_readme_of_the_quick_run_or_of_a_study():
    """Or of a study's tables: a sentence about them must not say what an earlier run of it had."""
    paths = [ROOT / "README.md", ROOT / "data" / "tiny" / "README.md", *RESULTS.glob("*.md")]
    sources = "".join(path.read_text(encoding="utf-8") for path in paths)
    known = measured(TEXT) | {float(number) for number in re.findall(r"\d+\.\d+", sources)}
    assert unknown_numbers(section(TEXT, "Why it works"), known) == []


def test_the_settings_are_those_of_the_presets():
    """The table of appendix B: a default that changes, changes there."""
    rows = [row.split(" | ") for row in section(TEXT, "Appendix B").splitlines() if "`--" in row and row[0] == "|"]
    settings = [dust.parse_args(["--preset", preset]) for preset in ("laptop", "paper")]
    for _, options, *columns in rows:
        names = [option.replace("-", "_") for option in re.findall(r"--([a-z-]+)", options)]
        for args, column in zip(settings, columns):
            stated = re.findall(r"\d[\d.e-]*", column)[: len(names)]
            assert [float(getattr(args, name)) for name in names] == [float(value) for value in stated], options
    assert len(rows) == 10


# -------------------------------------------------------------------------------------------- excerpts and names


def source_of(name: str) -> str:
    """The source of MODULE.NAME, or of MODULE.CLASS.NAME."""
    module, _, attribute = name.partition(".")
    if module in ("data", "plumbing"):
        inner, _, attribute = attribute.partition(".")
        module = f"{module}.{inner}"
    value = importlib.import_module(module)
    for part in attribute.split("."):
        value = getattr(value, part)
    return inspect.getsource(value)


def missing_from(source: str, excerpt: str) -> str:
    """The first run of lines of an excerpt that does not stand in the source, after those before it; or ""."""
    rest = source
    for run in re.split(r"^ *\.\.\.\n", excerpt, flags=re.MULTILINE):
        before, found, rest = rest.partition(run)
        if not found or (before and not before.endswith("\n")):
            return run
    return ""


def test_every_excerpt_is_the_source():
    """Code in a page is read as the code; when the source changes, so has the page."""
    assert len(excerpts(TEXT)) >= 7
    for name, body in excerpts(TEXT):
        gone = missing_from(source_of(name), body)
        assert not gone, f"no longer in {name}:\n{gone}"


def test_a_changed_excerpt_is_seen():
    source = "def f(x):\n    y = x\n    y += 1\n    return y\n"
    for same in (source, "    y = x\n...\n    return y\n", "def f(x):\n    ...\n    y += 1\n"):
        assert missing_from(source, same) == "", same
    for other in ("    y = 2 * x\n", "    return y\n...\n    y = x\n", "y = x\n", "    y = x\n    return y\n"):
        assert missing_from(source, other), other


def test_no_block_escapes_the_checks():
    """A block with another info string is neither run nor compared, and "```python excerpt" was no Python to some
    renderers, and to all readers a block like those that they paste."""
    infos = re.findall(r"^```(\S.*)$", TEXT, flags=re.MULTILINE)
    assert set(infos) == {"python", "text", "sh"}
    assert len(re.findall(r"^```", TEXT, flags=re.MULTILINE)) == 2 * len(infos)
    marks = [line for line in TEXT.splitlines() if line.startswith(("# from ", PRINTED.strip()))]
    assert len(marks) == len(excerpts(TEXT)) + len(printed(TEXT)) and len(printed(TEXT)) == 3


def test_an_excerpt_is_told_from_a_block_that_runs():
    text = "```python\n# from grpo.f(): to read, not to paste\n    x = 1\n```\n```python\n# from 2 to 3\nx = 2\n```\n"
    text += "```text\n# printed by a quick run\n0.5\n```\n```text\n0.6\n```\n"
    assert runnable(text) == ["# from 2 to 3\nx = 2\n"] and excerpts(text) == [("grpo.f", "    x = 1\n")]
    assert printed(text) == ["0.5\n"] and measured(text) == {0.5}


def test_lines_of_prose_are_of_a_readable_width():
    """Tables, and what a study wrote, have lines as long as they need."""
    for name in ("README.md", "tutorial.md"):
        text = re.sub(r"<!-- results.*?<!-- end -->", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
        long = [line for line in text.splitlines() if len(line) > 120 and not line.lstrip("# ").startswith(("|", "!"))]
        assert long == [], name


def known_names() -> set[str]:
    """Every function, class and method of the project, with and without its module's name."""
    names = set()
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, value in vars(module).items():
            if not callable(value):
                continue
            names |= {name, f"{module_name.rpartition('.')[2]}.{name}"}
            if inspect.isclass(value):
                names |= {f"{name}.{method}" for method in vars(value)}
    return names


def known_options(monkeypatch, capsys) -> set[str]:
    """What --help of dust.py and of make_tiny.py lists."""
    for module in ("dust", "data.make_tiny"):
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(module).main()
    others = {"--nproc-per-node", "--enable-lora", "--max-lora-rank", "--no-enable-chunked-prefill"}  # torchrun, vLLM
    return set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) | others


def strange(text: str, names: set[str], options: set[str]) -> list[str]:
    code = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    called = [match[1] for span in code if (match := re.fullmatch(r"([\w.]+)\(\)", span))]
    given = [option for span in code for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", span)]
    return [name for name in called if name not in names] + [option for option in given if option not in options]


def test_every_function_and_option_named_exists(monkeypatch, capsys):
    assert strange(TEXT, known_names(), known_options(monkeypatch, capsys)) == []


def test_a_name_that_does_not_exist_is_seen():
    text = "`grpo.update()` and `update()`, `--kl 0`; but `grpo.improve()` with `--klx 1`.\n"
    assert strange(text, known_names(), {"--kl"}) == ["grpo.improve", "--klx"]


VERSIONS = {"2605.11299", "3.10", "3.13", "2.13", "0.32", "0.8"}  # and how many million weights


def stray_numbers(readme: str, sources: str) -> list[str]:
    """The decimals of a page that stand in none of the results."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", readme, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"(?<![\w.,])\d+\.\d+", text)
    return [number for number in found if number not in VERSIONS and number not in re.findall(r"\d+\.\d+", sources)]


def lines_of_table_2(result: dict) -> list[str]:
    """The table of the README, from the JSON of the study. A gain that is zero by construction is left empty."""
    method, metrics = result["variants"]["rank"], ("pass1", "ndcg_all", "ndcg_mixed", "best_of_4", "best_of_8")
    shown = {"judge": metrics[1:4], "both": ("pass1", "ndcg_all", "best_of_4")}

    def cell(figure: dict, sign: str = "") -> str:
        return "{mean:{s}.1f} [{low:{s}.1f}, {high:{s}.1f}]".format(**figure, s=sign)

    lines = [(report.TITLES[row], [cell(figures[m]) for m in metrics]) for row, figures in method["rows"].items()]
    lines += [(f"gain of {'the judge' if gain == 'judge' else gain}",
               [cell(method["gains"][gain][m], "+") if m in shown[gain] else "" for m in metrics]) for gain in shown]
    return [re.sub(r"  +", " ", f"| {title} | {' | '.join(cells)} |") for title, cells in lines]


def test_every_measured_number_of_the_readme_is_one_of_the_results():
    """The first page is read most and changed least, so it keeps the numbers of old runs."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = lines_of_table_2(json.loads((RESULTS / "table2.json").read_text(encoding="utf-8")))
    assert [line for line in table if line not in readme.splitlines()] == []
    rest = "\n".join(line for line in readme.splitlines() if line not in table)
    for piece in re.split(r"\n\n|\n(?=\| )", rest):  # a paragraph or a row: table 2, the speeds, and what it names
        named = {path.stem for path in RESULTS.glob("*.md") if re.search(rf"[`\[/]{path.stem}[`\].]", piece)}
        known = "".join((RESULTS / f"{name}.md").read_text(encoding="utf-8") for name in {"table2", "speed", *named})
        assert stray_numbers(piece, known) == [], piece
    assert stray_numbers("It gains 24.2 and 24.3 with torch 2.13.0.", "| +24.2 |") == ["24.3"]
    assert len(readme.splitlines()) < 200


def test_every_file_linked_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", prose(TEXT)):
        assert target.startswith("http") or (ROOT / target).exists(), target


# ------------------------------------------------------------------------------------------------- the studies' results


def part_of(report: str, title: str) -> str:
    """The body of a second-level section of a study's report; "" where it has none."""
    found = re.search(rf"^## {re.escape(title)}\n+(.*?)(?=^## |\Z)", report, flags=re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def block_of(name: str, results: Path) -> str:
    """What stands in the tutorial about a study: its figure, its gains, its differences and its reading."""
    if not (results / f"{name}.json").exists():
        return NOT_YET
    report = (results / f"{name}.md").read_text(encoding="utf-8")
    titles = ("Gains over the base", "Differences (from the first variant, if no other is named)",
              "Mixed groups for training", "Wrong labels in the training groups", "Skills", "Reading")
    parts = [f"![{name}: means and intervals of each variant](data/results/{name}.png)"]
    return "\n\n".join(parts + [f"**{title}**\n\n{part}" for title in titles if (part := part_of(report, title))])


def fill(text: str, results: Path) -> str:
    """The tutorial with what data/results/ holds between the markers of each study."""
    for name in STUDIES:
        begin, end = f"<!-- results: {name} -->\n", "\n<!-- end -->"
        before, found, rest = text.partition(begin)
        assert found and end in rest, f"no place for {name}"
        text = before + begin + block_of(name, results) + end + rest.partition(end)[2]
    return text


def cells_of(result: dict) -> dict[str, list[str]]:
    """title of a variant -> its gains as a report writes them, from the JSON: pass@1, NDCG, NDCG mixed, Best-of-4."""

    def cell(figure: dict) -> str:
        return "{mean:+.1f} [{low:+.1f}, {high:+.1f}]".format(**figure) if figure["mean"] is not None else "-"

    columns = (("both", "pass1"), ("both", "ndcg_all"), ("judge", "ndcg_mixed"), ("both", "best_of_4"))
    return {result["titles"][name]: [cell(own["gains"][gain][metric]) for gain, metric in columns]
            for name, own in result["variants"].items()}


def test_results_stand_in_the_tutorial_as_the_studies_wrote_them():
    """Without a result nothing but these three words may stand there: a number from memory would look measured."""
    assert fill(TEXT, RESULTS) == TEXT, "python tests/test_tutorial.py writes them anew"
    assert sum(f"\n<!-- results: {name} -->\n" in TEXT for name in STUDIES) == len(STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_the_numbers_of_a_study_are_those_of_its_json(name):
    check_study(name, TEXT, RESULTS)


def check_study(name: str, text: str, results: Path) -> None:
    block = text.partition(f"<!-- results: {name} -->\n")[2].partition("\n<!-- end -->")[0]
    if not (results / f"{name}.json").exists():
        assert block == NOT_YET
        return
    assert (results / f"{name}.png").exists()
    for title, cells in cells_of(json.loads((results / f"{name}.json").read_text(encoding="utf-8"))).items():
        assert f"| {title} | {' | '.join(cells)} |" in block


def test_a_result_that_is_not_the_studys_is_seen(tmp_path):
    figure = {"mean": 21.84, "low": 18.8, "high": 24.8}
    metrics = dict.fromkeys(("pass1", "ndcg_all", "ndcg_mixed", "best_of_4"), figure)
    gains = {"both": metrics, "judge": metrics}
    result = {"titles": {"rank": "the method"}, "variants": {"rank": {"gains": gains}}}
    row = "| the method | " + " | ".join(["+21.8 [+18.8, +24.8]"] * 4) + " |"
    report = f"# T\n\n## Gains over the base\n\n{row}\n\n## Values\n\nno\n\n## Reading\n\nSo it is.\n"
    (tmp_path / "table2.json").write_text(json.dumps(result))
    (tmp_path / "table2.md").write_text(report)
    (tmp_path / "table2.png").write_text("")
    empty = "".join(f"<!-- results: {name} -->\n{NOT_YET}\n<!-- end -->\n" for name in STUDIES)
    filled = fill(empty, tmp_path)
    assert f"**Gains over the base**\n\n{row}" in filled and "So it is." in filled
    assert "no\n" not in filled and filled.count(NOT_YET) == len(STUDIES) - 1
    assert fill(filled, tmp_path) == filled
    for name in STUDIES:
        check_study(name, filled, tmp_path)
    with pytest.raises(AssertionError):
        check_study("table2", filled.replace("+21.8", "+22.8", 1), tmp_path)
    with pytest.raises(AssertionError):
        check_study("table3", filled.replace(NOT_YET, "about 22 points"), tmp_path)


# -------------------------------------------------------------------------------------------------------- the real run


@pytest.mark.skipif("DUST_SLOW" not in os.environ, reason="a minute; DUST_SLOW=1 runs it")
def test_the_quick_run_prints_what_the_tutorial_says(tmp_path):
    """The quoted lines of `python dust.py --quick`, without the times. On other hardware sums round in another way
    and a sampled token may differ, so this is no part of the ordinary tests."""
    command = [sys.executable, ROOT / "dust.py", "--quick", "--workers", "1", "--out", tmp_path / "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    said = output.stdout + output.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("reward", "constant", "zero_variance"):
        said += f"\n{name:<13}" + "".join(f"{step[name]:6.2f}" for step in steps)
    first = json.loads((tmp_path / "run" / "candidates.jsonl").read_text().splitlines()[0])["answer"]
    assert all(block in first + "\n" for block in fences(TEXT, "text") if not block.startswith(PRINTED))
    quoted = [line for block in printed(TEXT) for line in block.splitlines() if line.strip()]
    assert len(quoted) == 10 and [line for line in quoted if line.strip() not in said] == []
    assert [words for words in on_the_page(tmp_path / "run") if words not in " ".join(TEXT.split())] == []


def on_the_page(run: Path) -> list[str]:
    """What the tour says of the page of the quick run, as the files of the run have it."""
    step = json.loads((run / "steps.jsonl").read_text().splitlines()[0])["groups"][0]
    tokens, parts = [token for answer in step["tokens"] for token in answer], {True: [], False: []}
    for text, before, after, _ in tokens:
        parts[text in (": yes", ": no")].append(abs(after - before))
    verdicts, others = (sum(part) / len(part) for part in (parts[True], parts[False]))
    before, after = next(token[1:3] for token in step["tokens"][3] if token[0] == ": no")
    rankings = [dict(map(json.loads, (run / f"{name}-rankings.jsonl").read_text().splitlines()))["21"][0][0]
                for name in ("base", "judge")]
    answers = [ranking.splitlines() for ranking in rankings]
    assert rankings[0].count(": no") == 4 and rankings[0].endswith("Ranking: 1, 2, 3, 4")
    group = json.loads((run / "groups.jsonl").read_text().splitlines()[21])
    assert [one["correct"] for one in group["candidates"]] == [False, True, False, False]
    [failure] = {(one["failure"]["given"].strip(), one["failure"]["printed"], one["failure"]["wanted"].strip())
                 for one in group["candidates"] if not one["correct"]}
    [(no, yes), _] = [pair for pair in zip(*answers) if len(set(pair)) > 1]
    assert (no.endswith(": no"), yes) == (True, no.removesuffix("no") + "yes")
    return [f"Of these {len(tokens)} tokens {len(parts[True])} are verdicts",
            f"moved by {verdicts:.3f} on average, all others by {others:.3f}",
            f"Answer 4 has the advantage {step['advantages'][3]:.2f}", f"stood at {before} before", f"at {after} after",
            "for `{}` they print `{}`, and `{}` is wanted".format(*failure),
            f"says yes to `{no.partition(' -> ')[2].removesuffix(': no')}`"]


if __name__ == "__main__":
    TUTORIAL.write_text(fill(TEXT, RESULTS), encoding="utf-8")
