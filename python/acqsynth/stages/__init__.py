"""The work of each stage: functions that read artefacts of other steps and write their own.

:mod:`acqsynth.pipeline` decides which functions a recipe needs, and with which arguments. Model libraries are imported
inside the functions, so that planning does not need them.
"""
