"""Tables → text: golden CSV, LaTeX and terminal."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from ddil_eval.report import rendering as render
from ddil_eval.report.records import RecordedEstimate
from ddil_eval.report.table_type import Column, Table
from ddil_eval.report.tables import build
from ddil_eval.report.terminal import to_rich
from tests.records import p_teacher, record, system

CSV = """\
p_teacher,fd_efflite0,fd_efflite0_low,fd_efflite0_high,drawn_right,drawn_right_low,drawn_right_high,n,nfe,paper_fid,paper_clip
0.8,12.123456789012344,11.623456789012344,12.623456789012344,0.75,0.71875,0.78125,256,52.0,23.14,0.319
0.6,,,,,,,,,22.33,0.317
0.4,12.5,12.0,13.0,,,,256,27.6,21.95,0.313
0.2,,,,,,,,,21.92,0.307
"""

LATEX = r"""\begin{table}[tb]
\centering
\caption{At each transition the teacher acts with probability p\_teacher, else the student. Teacher shapes, student runs/pd\_4, data shapes val, recipe shapes-64, solver ddim, guidance 3, reflection clamp, seed 0, N requested 256; brackets contain 95\% intervals.}
\label{LABEL}
\medskip\footnotesize\setlength{\tabcolsep}{3pt}
\begin{tabular}{@{}lrrrrrr@{}}
\toprule
 & \multicolumn{4}{c}{Measured} & \multicolumn{2}{c}{Paper (SD 1.5)} \\
\cmidrule(lr){2-5} \cmidrule(lr){6-7}
p\_teacher & \shortstack[r]{fd\_\\efflite0 $\downarrow$} & \shortstack[r]{drawn\_\\right $\uparrow$} & N & NFE & FID $\downarrow$ & CLIP $\uparrow$ \\
\midrule
0.8 & $12.12$ & $0.750$ & $256$ & $52$ & $23.14$ & $0.319$ \\
 & {\scriptsize $[11.62, 12.62]$} & {\scriptsize $[0.719, 0.781]$} &  &  &  &  \\[2pt]
0.6 &  &  &  &  & $22.33$ & $0.317$ \\
0.4 & $12.50$ &  & $256$ & $27.6$ & $21.95$ & $0.313$ \\
 & {\scriptsize $[12.00, 13.00]$} &  &  &  &  &  \\[2pt]
0.2 &  &  &  &  & $21.92$ & $0.307$ \\
\bottomrule
\end{tabular}
\par\smallskip{\footnotesize The paper's numbers are for SD 1.5 on COCO, which is another world: compare directions, not values.\par}
\par\smallskip{\footnotesize Not measured: p\_teacher = 0.6: no record; p\_teacher = 0.2: no record; p\_teacher = 0.4: its record has no drawn\_right.\par}
\end{table}
"""  # noqa: E501

TERMINAL_ROWS = """\
                                                             FID ↓   CLIP ↑
  p_teacher    fd_efflite0 ↓    drawn_right ↑     N    NFE   paper    paper
  ─────────────────────────────────────────────────────────────────────────
  0.8                  12.12            0.750   256     52   23.14    0.319
              [11.62, 12.62]   [0.719, 0.781]
  0.6                                                        22.33    0.317
  0.4                  12.50                    256   27.6   21.95    0.313
              [12.00, 13.00]
  0.2                                                        21.92    0.307
"""


@pytest.fixture(scope="module")
def table() -> Table:
    records = [p_teacher(0.8, fd=12.123456789012344, nfe=52.0), p_teacher(0.4, right=None, nfe=27.6)]
    return next(table for table in build(records) if table.name == "table2")


def all_tables() -> list[Table]:
    records = [
        p_teacher(0.8),
        record({"kind": "effect", "transitions": [0]}, nfe=None),
        system("A&B_%$#{}~^\\ é 图", 4),
    ]
    return build([*records, record({"kind": "difference", "name": "[a] − *b*"}, experiment="systems", systems={})])


def test_csv_is_golden(table: Table) -> None:
    assert render.to_csv(table) == CSV


def test_csv_gives_back_every_digit(table: Table) -> None:
    first = next(csv.DictReader(io.StringIO(render.to_csv(table))))
    assert float(first["fd_efflite0"]) == 12.123456789012344


def test_latex_is_golden(table: Table) -> None:
    assert render.to_latex(table) == LATEX.replace("LABEL", table.label)


def test_terminal_is_golden(table: Table) -> None:
    console = Console(width=120, file=io.StringIO(), color_system=None)
    with console.capture() as shown:
        console.print(to_rich(table))
    lines = [line.rstrip() for line in shown.get().splitlines()]
    start = next(i for i, line in enumerate(lines) if "CLIP ↑" in line)
    assert "\n".join(lines[start : start + 9]) + "\n" == TERMINAL_ROWS
    assert lines[0].startswith("Table 2. At each transition")


def test_json_keeps_names_and_digits(table: Table) -> None:
    document = render.to_dict(table)
    assert document["rows"][0]["fd_efflite0"] == 12.123456789012344
    assert document["rows"][1] == dict.fromkeys(table.header()) | {
        "p_teacher": 0.6, "paper_fid": 22.33, "paper_clip": 0.317,
    }  # fmt: skip
    assert [c["source"] for c in document["columns"]] == ["setting"] + ["measured"] * 4 + ["paper"] * 2


@pytest.mark.parametrize(
    ("half", "printed"),
    [(20.0, ["123", "[103, 143]"]), (0.3, ["123.46", "[123.16, 123.76]"]), (0.0, ["123.457", "[123.457, 123.457]"])],
)
def test_print_shows_two_digits_of_the_half_width(half: float, printed: list[str]) -> None:
    estimate = RecordedEstimate(value=123.456789, low=123.456789 - half, high=123.456789 + half, n=9)
    table = Table("g", "t", "T", "c.", (Column("m", "m", "measured", interval=True),), ((estimate,),))
    assert render.printed_cells(table) == [[printed]]


def test_latex_rows_have_as_many_cells_as_columns() -> None:
    for table in all_tables():
        body = render.to_latex(table).split(r"\midrule" + "\n")[1].split(r"\bottomrule")[0]
        assert body
        shown = [column for column in table.columns if not column.in_caption]
        for line in body.splitlines():
            assert len(re.findall(r"(?<!\\)&", line)) == len(shown) - 1


def marked() -> Table:
    """A difference that is significant, and one that is not; the first is also the best of its column."""
    estimates = [
        RecordedEstimate(value=-2.0, low=-3.0, high=-1.0, n=9, p_value=0.0004),
        RecordedEstimate(value=0.5, low=-0.5, high=1.5, n=9, p_value=0.25),
    ]
    return Table(
        "g", "t", "T", "c.", (Column("x", "X"), Column("m", "m", "measured", "lower", interval=True, tested=True)),
        (("a", estimates[0]), ("b", estimates[1])),
        significant=frozenset({(0, 1)}), best=frozenset({(0, 1)}), corrected={(0, 1): 0.0008, (1, 1): 0.25},
    )  # fmt: skip


def test_marks_need_no_hand_work() -> None:
    body = render.to_latex(marked()).split(r"\midrule" + "\n")[1].split(r"\bottomrule")[0]
    assert body == (
        "a & $\\mathbf{-2.0}^{*}$ \\\\\n"
        " & {\\scriptsize $[-3.0, -1.0]$} \\\\\n"
        " & {\\scriptsize $p < 0.001$} \\\\[2pt]\n"
        "b & $0.5$ \\\\\n"
        " & {\\scriptsize $[-0.5, 1.5]$} \\\\\n"
        " & {\\scriptsize $p = 0.250$} \\\\[2pt]\n"
    )
    assert (
        render.to_csv(marked())
        == "x,m,m_low,m_high,m_p,m_p_holm\na,-2.0,-3.0,-1.0,0.0004,0.0008\nb,0.5,-0.5,1.5,0.25,0.25\n"
    )
    assert render.to_dict(marked())["significant"] == [{"row": 0, "column": "m"}] == render.to_dict(marked())["best"]


def test_the_terminal_shows_the_same_marks() -> None:
    console = Console(width=80, file=io.StringIO(), color_system="standard", force_terminal=True)
    with console.capture() as shown:
        console.print(to_rich(marked()))
    assert "\x1b[1m-2.0*" in shown.get() and "0.5*" not in shown.get()
    assert "p < 0.001" in shown.get() and "p = 0.250" in shown.get()


def test_escape_leaves_no_special_character() -> None:
    assert render.escape("50% of a_b & $c #1 {x} ~ ^ \\") == (
        r"50\% of a\_b \& $\$$c \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{}"
    )
    assert render.escape("749→500 é 图") == r"749$\to$500 é \texttt{U+56FE}"


@pytest.mark.parametrize(
    ("p_value", "printed"),
    [
        (0.0, "p < 0.001"), (0.00099, "p < 0.001"), (0.001, "p = 0.001"), (0.0094, "p = 0.009"), (0.00996, "p < 0.01"),
        (0.01, "p = 0.010"), (0.0494, "p = 0.049"), (0.0496, "p < 0.05"), (0.04999999999, "p < 0.05"), (0.05, "p = 0.050"),
        (0.0504, "p = 0.050"), (0.9999, "p = 1.000"), (1.0, "p = 1.000"),
    ],
)  # fmt: skip
def test_a_p_value_is_never_rounded_onto_a_level_that_it_is_below(p_value: float, printed: str) -> None:
    estimate = RecordedEstimate(value=1.0, low=0.5, high=1.5, n=9, p_value=p_value)
    table = Table("g", "t", "T", "c.", (Column("m", "m", "measured", interval=True, tested=True),), ((estimate,),))
    assert render.printed_cells(table) == [[["1.00", "[0.50, 1.50]", printed]]]


def of_names(*names: str) -> Table:
    estimate = RecordedEstimate(value=-0.0, low=-0.0004, high=0.004, n=9)
    columns = (Column("x", "X"), Column("m", "m", "measured", interval=True), Column("y", "Y"))
    return Table("g", "t", "T", "c.", columns, tuple((name, estimate, -0.0) for name in names))


def test_zero_has_no_sign() -> None:
    table, console = of_names("a"), Console(width=80, file=io.StringIO(), color_system=None)
    assert render.printed_cells(table) == [[["a"], ["0.0000", "[-0.0004, 0.0040]"], ["0"]]]
    wide = RecordedEstimate(value=-0.04, low=-3.0, high=3.0, n=9)
    assert render.printed_cells(Table("g", "t", "T", "c.", (Column("m", "m"),), ((wide,),))) == [
        [["0.0", "[-3.0, 3.0]"]]
    ]
    assert render.to_csv(table) == "x,m,m_low,m_high,y\na,0.0,-0.0004,0.004,0.0\n"
    assert "-0.0," not in json.dumps(render.to_dict(table)["rows"]) and "-0.0}" not in json.dumps(render.to_dict(table))
    with console.capture() as shown:
        console.print(to_rich(table))
    assert not re.search(r"-0(\.0*)?(?![\d.])", shown.get() + render.to_latex(table))


@pytest.mark.parametrize(
    "name",
    ["a--b", "x---y", "?`q", "!`q", "``a''", "<<a>>", ",,a", "’’", '""', "\"'", "'\"'", "–-", "---—", "?``", "-" * 9],
)
def test_latex_joins_no_characters_of_a_name(name: str) -> None:
    """Between what two characters become nothing is joined; what one becomes, as a dash does, is as it is alone."""
    pieces, rest = [render.escape(character) for character in name], render.escape(name)
    for before, after in itertools.pairwise(pieces):
        rest = rest.removeprefix(before)
        parted = rest.startswith("{}" + after)
        assert parted == (before[-1] + after[0] in {"--", "``", "''", "?`", "!`", ",,"})
        assert parted or rest.startswith(after)
        rest = rest.removeprefix("{}") if parted else rest
    assert rest == pieces[-1]


def test_latex_ligatures_are_golden() -> None:
    assert render.escape("PD -- DDIL --- ?` !` ``x'' ,, <<>>") == (
        "PD -{}- DDIL -{}-{}- ?{}` !{}` `{}`x'{}' ,{}, $<$$<$$>$$>$"
    )
    assert render.escape("a–b—c \"'") == "a--b---c ''{}'"
    assert render.escape("*a") == "{*}a"
    assert render.escape("a\tb\r\nc\x0cd\x00\x7f\u0085") == (
        r"a b  c\texttt{U+000C}d\texttt{U+0000}\texttt{U+007F}\texttt{U+0085}"
    )
    assert render.escape("é ß ł «ð»") == r"é ß ł \texttt{U+00AB}\texttt{U+00F0}\texttt{U+00BB}"


@pytest.mark.parametrize(
    ("name", "written"),
    [
        *((name, name) for name in ('a"b', "a,b", " a ", "é", "a=1", "teacher − student", "-1.5e-3", "+2", "")),
        ("a\r\nb", r"a\r\nb"), ("\x1b]0;title\x07", r"\x1b]0;title\x07"), ("\u202ea", r"\u202ea"), ("\x9b2J", r"\x9b2J"),
        *((name, f"'{name}") for name in ('=HYPERLINK("http://x")', "+1+1", "-1+2", "@SUM(A1)", " =1", "＝1")),
        ("\t=1", r"\t=1"),
    ],
)  # fmt: skip
def test_csv_gives_back_every_name_but_control_characters_and_formulas(name: str, written: str) -> None:
    read = list(csv.reader(io.StringIO(render.to_csv(of_names(name, "next")), newline="")))
    assert [row[0] for row in read] == ["x", written, "next"]


def test_latex_compiles_with_booktabs_alone(tmp_path: Path) -> None:
    engine = shutil.which("pdflatex") or shutil.which("tectonic")
    if engine is None:
        pytest.skip("neither pdflatex nor tectonic is installed")
    body = "\n".join(map(render.to_latex, all_tables()))
    text = f"\\documentclass{{article}}\n\\usepackage{{booktabs}}\n\\begin{{document}}\n{body}\\end{{document}}\n"
    (tmp_path / "tables.tex").write_text(text)
    options = ["-interaction=nonstopmode", "-halt-on-error"] if engine.endswith("pdflatex") else []
    done = subprocess.run([engine, *options, "tables.tex"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "tables.pdf").stat().st_size > 0
    assert "Overfull" not in done.stdout


@pytest.mark.parametrize(
    ("p_value", "form", "shown"),
    [
        (0.0498, ".2g", "p < 0.05"),
        (0.0098, ".2g", "p = 0.0098"),
        (0.0004, ".2g", "p < 0.001"),
        (0.0496, ".3f", "p < 0.05"),
    ],
)
def test_rounding_moves_no_p_value_onto_a_level(p_value: float, form: str, shown: str) -> None:
    assert render.print_p(p_value, form) == shown
