"""The work of each stage: functions that read artefacts of other steps and write their own.

:mod:`acqsynth.pipeline` decides which functions a recipe needs, and with which arguments. Model libraries are imported
inside the functions, so that planning does not need them.
"""

from __future__ import annotations

from acqsynth.stages.questions import (
    Writing as Writing,
    label_questions as label_questions,
    select_questions as select_questions,
    train_generator as train_generator,
    write_questions as write_questions,
)
from acqsynth.stages.rows import (
    Scoring as Scoring,
    collect_rows as collect_rows,
    filter_rows as filter_rows,
    random_rows as random_rows,
)
from acqsynth.stages.students import (
    Replay as Replay,
    answer_rows as answer_rows,
    fit_student as fit_student,
    measure_validity as measure_validity,
)
