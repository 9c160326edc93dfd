"""What the tables say: names, titles and captions, and the paper's columns beside ours."""

from __future__ import annotations

from ddil_eval.report.comparisons import BOLD
from ddil_eval.report.table_type import Column

OF_FOLDERS = "Paired differences between folders of images with the same ids."
DIFFERENCES = "Paired differences between systems on the same prompts and seeds."
OVER_SEEDS = "Rows with seeds are means over students of several training seeds, with intervals over seeds and prompts."
PAIRED_SEEDS = (
    "Where systems have several training seeds, intervals and tests are over seeds and prompts; equally many seeds are "
    "paired."
)

COMPARED = {
    "systems": (
        "table1", "systems", "Systems", f"Systems on the same prompts and seeds. {BOLD}",
        Column("paper_fid", "FID", "paper", "lower"),
        "The paper's FID is for SD 1.5 on COCO 2014, with an image preparation that the paper does not state",
    ),
    "score": (
        "table1", "systems", "Folders", f"Folders of images against one reference. {BOLD}",
        Column("paper_fid", "FID", "paper", "lower"),
        "The paper's FID is for SD 1.5 on COCO 2014, with an image preparation that the paper does not state",
    ),
    "prompt-inversion": (
        "table5", "table5", "Table 5", f"Each system generates images from prompts that the teacher inverted. {BOLD}",
        Column("paper_lpips_div", "LPIPS_Div", "paper", "higher"),
        "The paper's LPIPS_Div is for SD 1.5 on images that the paper does not name",
    ),
}  # fmt: skip
"""For each comparison: the paper's table; our table, its title and its caption; the paper's column and a note on it."""

PAPER_TABLES = (
    (
        "table2",
        "p_teacher",
        "p_teacher",
        "At each transition the teacher acts with probability p_teacher, else the student.",
    ),
    ("table3", "teacher_then_student", "switch_t", "The teacher acts until t = switch_t, then the student."),
    ("table4", "student_then_teacher", "switch_t", "The student acts until t = switch_t, then the teacher."),
)
"""Name, kind of cell, the number that orders the rows, and the caption [paper, Tables 2-4]."""


DRIFT = (
    (
        "drift",
        "Drift",
        "Disagreement of student and teacher on data, on the teacher's states and on the student's own, with its "
        "ratios.",
        False,
    ),
    (
        "drift-ratios",
        "Drift: ratios",
        "Logarithms of the ratios: 0 is no covariate shift.",
        True,
    ),
    (
        "drift-states",
        "Drift: states",
        "Kernel distances of the student's states from data and from the teacher's states, with their permutation "
        "tests, and the share that a linear probe tells apart, above chance.",
        True,
    ),
    (
        "drift-paths",
        "Drift: trajectories",
        "Distance of the two trajectories after each transition, the share of the end that x̂ holds before it, and the "
        "variance errors of the student's states.",
        False,
    ),
    ("drift-difference", "Drift: two students", "The first student less the second, on the same prompts.", True),
    (
        "drift-group",
        "Drift: groups",
        "Means over the students of a group, one for each training seed, with intervals over seeds and prompts.",
        False,
    ),
    (
        "drift-group-spread",
        "Drift: groups, spread",
        "Standard deviations of the means of seeds and of the means of prompts.",
        False,
    ),
    (
        "drift-group-difference",
        "Drift: two groups",
        "The first group less the second, paired by training seed, with intervals and tests over seeds and prompts "
        "(min F′).",
        True,
    ),
    (
        "drift-group-difference-spread",
        "Drift: two groups, spread",
        "Standard deviations of the paired differences: of the means of seeds and of the means of prompts.",
        False,
    ),
)
"""Kind of cells, title, caption, and whether the cells are tested, for the tables of the drift experiment."""


EFFECTS = (
    (
        1,
        "main-effects",
        "Main effects",
        "Mean of the strings with the student at a transition, minus the mean of the strings with the teacher there.",
    ),
    (
        2,
        "interactions",
        "Interactions",
        "Mean of the strings with one model at both transitions, minus the mean of the strings with each model at one.",
    ),
)
"""Number of transitions, name, title, and the contrast over all strings."""
