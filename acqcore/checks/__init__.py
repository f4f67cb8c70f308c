"""Every validation of public arguments. Each function raises ValueError or TypeError that names the argument, what was
given and what was expected; code below the public edge trusts its input. A leaf: imports torch only."""

from __future__ import annotations

from acqcore.checks.basic import (
    FLOAT_DTYPES as FLOAT_DTYPES,
)
from acqcore.checks.basic import (
    IGNORE_INDEX as IGNORE_INDEX,
)
from acqcore.checks.basic import (
    at_most as at_most,
)
from acqcore.checks.basic import (
    describe as describe,
)
from acqcore.checks.basic import (
    finite as finite,
)
from acqcore.checks.basic import (
    float_tensor as float_tensor,
)
from acqcore.checks.basic import (
    given as given,
)
from acqcore.checks.basic import (
    instance as instance,
)
from acqcore.checks.basic import (
    module as module,
)
from acqcore.checks.basic import (
    names as names,
)
from acqcore.checks.basic import (
    one_of as one_of,
)
from acqcore.checks.basic import (
    positive as positive,
)
from acqcore.checks.basic import (
    positive_int as positive_int,
)
from acqcore.checks.basic import (
    same_device as same_device,
)
from acqcore.checks.draws import (
    alike as alike,
)
from acqcore.checks.draws import (
    draw_arguments as draw_arguments,
)
from acqcore.checks.draws import (
    draw_layers as draw_layers,
)
from acqcore.checks.draws import (
    drawn_hidden as drawn_hidden,
)
from acqcore.checks.draws import (
    draws as draws,
)
from acqcore.checks.draws import (
    dropout as dropout,
)
from acqcore.checks.draws import (
    dropout_input as dropout_input,
)
from acqcore.checks.draws import (
    dropout_layers as dropout_layers,
)
from acqcore.checks.draws import (
    dropout_ran as dropout_ran,
)
from acqcore.checks.draws import (
    members_alone as members_alone,
)
from acqcore.checks.draws import (
    own_dropout as own_dropout,
)
from acqcore.checks.draws import (
    residual_branches as residual_branches,
)
from acqcore.checks.draws import (
    seed as seed,
)
from acqcore.checks.draws import (
    some_blocks as some_blocks,
)
from acqcore.checks.files import (
    column_options as column_options,
)
from acqcore.checks.files import (
    columns_present as columns_present,
)
from acqcore.checks.files import (
    data_rows as data_rows,
)
from acqcore.checks.files import (
    engine_options as engine_options,
)
from acqcore.checks.files import (
    installed as installed,
)
from acqcore.checks.files import (
    known_columns as known_columns,
)
from acqcore.checks.files import (
    one_pass as one_pass,
)
from acqcore.checks.files import (
    output_columns as output_columns,
)
from acqcore.checks.files import (
    output_place as output_place,
)
from acqcore.checks.files import (
    same_manifest as same_manifest,
)
from acqcore.checks.gradients import (
    block_count as block_count,
)
from acqcore.checks.gradients import (
    covered as covered,
)
from acqcore.checks.gradients import (
    differentiable as differentiable,
)
from acqcore.checks.gradients import (
    embedding_input as embedding_input,
)
from acqcore.checks.gradients import (
    embedding_output as embedding_output,
)
from acqcore.checks.gradients import (
    embedding_use as embedding_use,
)
from acqcore.checks.gradients import (
    gradient_parameters as gradient_parameters,
)
from acqcore.checks.gradients import (
    no_derivative as no_derivative,
)
from acqcore.checks.gradients import (
    not_relative as not_relative,
)
from acqcore.checks.gradients import (
    offsets as offsets,
)
from acqcore.checks.gradients import (
    one_kind_of_use as one_kind_of_use,
)
from acqcore.checks.gradients import (
    scored_tokens as scored_tokens,
)
from acqcore.checks.gradients import (
    small_module as small_module,
)
from acqcore.checks.gradients import (
    some_parameters as some_parameters,
)
from acqcore.checks.gradients import (
    tensor_by_sample as tensor_by_sample,
)
from acqcore.checks.gradients import (
    token_weights as token_weights,
)
from acqcore.checks.gradients import (
    trunk_parameters as trunk_parameters,
)
from acqcore.checks.gradients import (
    unchanged_input as unchanged_input,
)
from acqcore.checks.gradients import (
    whole_head as whole_head,
)
from acqcore.checks.gradients import (
    whole_parameters as whole_parameters,
)
from acqcore.checks.heads import (
    head as head,
)
from acqcore.checks.heads import (
    hidden as hidden,
)
from acqcore.checks.heads import (
    ignored_outside as ignored_outside,
)
from acqcore.checks.heads import (
    logits as logits,
)
from acqcore.checks.heads import (
    target_range as target_range,
)
from acqcore.checks.heads import (
    targets as targets,
)
from acqcore.checks.heads import (
    targets_in_range as targets_in_range,
)
from acqcore.checks.heads import (
    tiling as tiling,
)
from acqcore.checks.heads import (
    vocabulary as vocabulary,
)
from acqcore.checks.plans import (
    config_here as config_here,
)
from acqcore.checks.plans import (
    device_here as device_here,
)
from acqcore.checks.plans import (
    fits as fits,
)
from acqcore.checks.plans import (
    planned as planned,
)
from acqcore.checks.plans import (
    rates as rates,
)
from acqcore.checks.plans import (
    row_tokens as row_tokens,
)
from acqcore.checks.sample_data import (
    SAMPLE_KINDS as SAMPLE_KINDS,
)
from acqcore.checks.sample_data import (
    acquisition_args as acquisition_args,
)
from acqcore.checks.sample_data import (
    chat_template as chat_template,
)
from acqcore.checks.sample_data import (
    completion as completion,
)
from acqcore.checks.sample_data import (
    context as context,
)
from acqcore.checks.sample_data import (
    last_turn as last_turn,
)
from acqcore.checks.sample_data import (
    messages as messages,
)
from acqcore.checks.sample_data import (
    prompt as prompt,
)
from acqcore.checks.sample_data import (
    reply as reply,
)
from acqcore.checks.sample_data import (
    required_arguments as required_arguments,
)
from acqcore.checks.sample_data import (
    same_kind as same_kind,
)
from acqcore.checks.sample_data import (
    sample_columns as sample_columns,
)
from acqcore.checks.sample_data import (
    sample_kind as sample_kind,
)
from acqcore.checks.sample_data import (
    sample_length as sample_length,
)
from acqcore.checks.sample_data import (
    sample_sequence as sample_sequence,
)
from acqcore.checks.sample_data import (
    scored as scored,
)
from acqcore.checks.sample_data import (
    tensor_samples as tensor_samples,
)
from acqcore.checks.sample_data import (
    text as text,
)
from acqcore.checks.sample_data import (
    token_ids as token_ids,
)
from acqcore.checks.sample_data import (
    token_values as token_values,
)
from acqcore.checks.sample_data import (
    tokenizer as tokenizer,
)
from acqcore.checks.sample_data import (
    tokens_kept as tokens_kept,
)
from acqcore.checks.students import (
    adapted_head as adapted_head,
)
from acqcore.checks.students import (
    causal_lm as causal_lm,
)
from acqcore.checks.students import (
    found_trunk as found_trunk,
)
from acqcore.checks.students import (
    linear_head as linear_head,
)
from acqcore.checks.students import (
    max_length as max_length,
)
from acqcore.checks.students import (
    probe as probe,
)
from acqcore.checks.students import (
    trunk as trunk,
)
from acqcore.checks.students import (
    trunk_output as trunk_output,
)
from acqcore.checks.vector_sets import (
    archive_state as archive_state,
)
from acqcore.checks.vector_sets import (
    like_vector as like_vector,
)
from acqcore.checks.vector_sets import (
    nonzero_rows as nonzero_rows,
)
from acqcore.checks.vector_sets import (
    not_empty as not_empty,
)
from acqcore.checks.vector_sets import (
    one_column as one_column,
)
from acqcore.checks.vector_sets import (
    preconditioner as preconditioner,
)
from acqcore.checks.vector_sets import (
    reference_sketches as reference_sketches,
)
from acqcore.checks.vector_sets import (
    ridge as ridge,
)
from acqcore.checks.vector_sets import (
    same_student as same_student,
)
from acqcore.checks.vector_sets import (
    vectors as vectors,
)
