"""The compact layout on a GPU: the tensors of ``layouts.compact``, with the jobs its CUDA kernels work off."""

from __future__ import annotations

from vllm_vptq.layouts.compact import CompactLayout
from vllm_vptq.layouts.plan import ABSENT, NORM_COLUMNS, NORM_ROWS, ModulePlan, SegmentPlan, decode
from vllm_vptq.layouts.work import Decoding, Job, Kind, Launch, LayerWork, LookupLayout, Module, Part, Variant

TOKENS = 8
"""Most tokens of one launch."""
_ROWS_PER_JOB = 8
"""Vector rows: one for each warp of a block."""
_JOBS_PER_PROCESSOR = 8
_LEAST_COLUMNS = 1024
"""Of a job: 32 for each lane, that the reduction at the end is worth it."""


def build(layout: CompactLayout, in_features: int, processors: int, direct_tokens: int) -> LookupLayout:
    """Adds the jobs for a GPU with ``processors`` multiprocessors to a compact layout."""
    launch = Launch()
    variant = Variant(TOKENS, [launch])
    decodings: list[Decoding] = []
    dense: list[tuple[int, int, int]] = []
    modules = decode(layout.plan)
    rows = sum(segment.vector_rows for module in modules for segment in module.segments)
    splits = max(
        1, min(in_features // _LEAST_COLUMNS, processors * _JOBS_PER_PROCESSOR * _ROWS_PER_JOB // max(rows, 1))
    )
    for module in modules:
        first = len(variant.parts)
        for segment in module.segments:
            _add_segment(module, segment, in_features, variant, launch, decodings, splits)
        end = module.out_start + module.out_features
        record = Module(module.out_start, end, first, len(variant.parts), dense=int(module.dense_offset != ABSENT))
        if module.dense_offset != ABSENT:
            dense.append((module.out_start, module.out_features, module.dense_offset))
        if module.norm_offset != ABSENT:
            record.dot, record.dots = variant.reserve(1), 1
            shift = ABSENT
            if module.norm_kind == NORM_ROWS:
                record.scale, record.shift = module.norm_offset, module.norm_offset + module.out_features
            else:
                shift = module.norm_offset + in_features
            launch.jobs.append([Job(Kind.DOT, column_end=in_features, row_end=TOKENS, out=record.dot, shift=shift)])
        variant.modules.append(record)
    layer = LayerWork(
        stationary=False,
        out_features=modules[-1].out_start + modules[-1].out_features,
        in_features=in_features,
        shared_bytes=0,
        direct_tokens=direct_tokens,
        variants=[variant],
        decodings=decodings,
        dense=dense,
    )
    work, plan = layer.encode(layout.qweight.device)
    return LookupLayout(layout.qweight, layout.codebooks, layout.norm, layout.columns, layout.dense, work, plan)


def _add_segment(
    module: ModulePlan,
    segment: SegmentPlan,
    in_features: int,
    variant: Variant,
    launch: Launch,
    decodings: list[Decoding],
    splits: int,
) -> None:
    step = max(_LEAST_COLUMNS, -(-segment.num_columns // splits) + 31 & ~31)
    ranges = [(lo, min(segment.num_columns, lo + step)) for lo in range(0, segment.num_columns, step)]
    scale = module.norm_offset if module.norm_kind == NORM_COLUMNS else ABSENT
    for plane in range(-(-segment.vector_len // 8)):
        sums = segment.vector_rows * 8
        at = variant.reserve(len(ranges) * sums)
        variant.parts.append(Part(at, len(ranges), sums, segment.vector_len, segment.skip, plane))
        for split, (begin, end) in enumerate(ranges):
            for row in range(0, segment.vector_rows, _ROWS_PER_JOB):
                launch.jobs.append([_job(segment, plane, scale, in_features, begin, end, row, at + split * sums)])
    whole = _job(segment, 0, scale, in_features, 0, segment.num_columns, 0, 0, whole=True)
    part = Part(0, 0, 0, segment.vector_len, segment.skip, 0)
    decodings.append(Decoding(len(variant.modules), whole, None, part))


def _job(
    segment: SegmentPlan, plane: int, scale: int, in_features: int, begin: int, end: int, row: int, out: int,
    *, whole: bool = False,
) -> Job:  # fmt: skip
    return Job(
        kind=Kind.COMPACT,
        scale=scale,
        shift=ABSENT if scale == ABSENT else scale + in_features,
        column_list=segment.column_offset,
        column_begin=begin,
        column_end=end,
        row_begin=row,
        row_end=segment.vector_rows if whole else min(segment.vector_rows, row + _ROWS_PER_JOB),
        codes=segment.word_offset,
        row_words=segment.row_words,
        book=segment.book_offset,
        res_book=segment.res_book_offset,
        out=out,
        vector_len=segment.vector_len,
        plane=plane,
        index_bits=segment.index_bits,
        res_bits=segment.res_bits,
    )
