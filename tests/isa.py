"""Tests that ``make test-isa`` repeats: the instruction set of torch, oneDNN or our kernels could change their outcome.

By file: those that are named, all their cases or one, or every test. It cannot change refusals, counts, and what is
compiled for GPUs.
"""

BY_FILE: dict[str, tuple[str, ...]] = {
    "artifact/test_packed.py": (
        "test_every_pattern_round_trips_bit_for_bit", "test_the_masks_of_a_group_are_numbered_from_0",
        "test_exported_graphs_are_packed_too",
    ),
    "export/test_lowered.py": (),
    "kernels/cpu/test_attention.py": (),
    "kernels/nm_linear/test_cpu_kernels.py": (),
    "kernels/nm_linear/test_cpu_operators.py": (),
    "kernels/test_isa.py": (),
    "kernels/test_nm_format.py": (
        "test_linear_round_trip_is_exact", "test_conv_round_trip_groups_are_along_input_channels",
    ),
    "kernels/test_token_merge.py": (),
    "kernels/test_triton_kernels.py": (
        "test_any_pattern_is_expanded", "test_token_merging_is_that_of_the_reference",
        "test_on_a_cpu_the_operators_run_the_reference",
    ),
    "passes/merge_tokens/schedules/test_solve.py": (
        "test_a_number_for_each_block", "test_a_linear_schedule",
    ),
    "passes/merge_tokens/test_axis.py": (
        "test_merges_after_windows_and_a_grid", "test_tables_with_tokens_before_heads", "test_follows_an_alias",
    ),
    "passes/merge_tokens/test_models.py": (
        "test_equals_the_eager_reference", "test_kinds_of_blocks", "test_kinds_of_attention",
        "test_written_out_attention", "test_a_mask_over_keys_hides_tokens_that_merge",
        "test_without_proportional_attention", "test_gradients_equal_the_reference", "test_r_0_is_bit_identical",
        "test_half_precision", "test_constant_token_counts_are_rewritten_in_export_graphs",
        "test_export_with_a_dynamic_batch", "test_export_with_a_dynamic_image_size",
        "test_dynamo_graphs_with_and_without_dynamic_batch",
    ),
    "passes/test_fold_norm.py": (
        "test_folded_and_lowered_equal_the_original", "test_resnets[resnet18-16]",
        "test_timm_norms_keep_their_activation", "test_half_precision_is_folded_in_double", "test_functions",
        "test_a_shared_norm_is_folded_twice",
    ),
    "passes/test_fold_scale.py": (
        "test_layer_scale_of_a_transformer", "test_half_precision", "test_forms",
    ),
    "passes/test_fuse.py": (
        "test_vit_by_symbolic_trace", "test_an_example_batch_of_one_fuses_too", "test_vit_by_dynamo",
        "test_bottleneck",
    ),
    "passes/test_fuse_nodes.py": (
        "test_activation_functions", "test_activation_modules", "test_additions",
        "test_activations_after_the_addition", "test_mlps", "test_convolutions_make_no_mlp",
    ),
    "passes/lower/test_masked.py": (
        "test_lowered_equals_masked_dense[2:4-vit-reference]",
        "test_lowered_equals_masked_dense[6:16-resnet18-reference]",
        "test_lowered_equals_masked_dense[6:16-mlp-reference]", "test_lowered_equals_masked_dense[2:4-mlp-dense]",
        "test_half_precision", "test_grouped_strided_dilated_convolutions",
        "test_refilling_packs_into_the_same_buffers",
    ),
}  # fmt: skip
