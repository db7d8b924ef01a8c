"""Messages of Triton's extensions, from the data plane's types."""

from __future__ import annotations

from collections.abc import Mapping

from ...accelerators.tensors import TensorSpec
from ...protos import open_inference_pb2 as oip
from .batching import DEFAULT_PRIORITY, LAST_PRIORITY
from .batching_choice import has_batch_axis
from .dataplane import DataPlane
from .ensemble_backend import ensemble_steps
from .errors import Code, ScoringError
from .instances import Instance
from .repository import index, served
from .shared_memory import SharedMemory
from .statistics import Duration, Snapshot

_TRACE = {
    "trace_level": ["OFF"],
    "trace_rate": ["0"],
    "trace_count": ["-1"],
    "log_frequency": ["0"],
}
_LOG: Mapping[str, bool | int | str] = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}


def model_config(plane: DataPlane, name: str, version: str) -> oip.ModelConfigResponse:
    """Of the default version unless another is asked for. Raises ScoringError NOT_FOUND.

    `max_batch_size` is 0 for a model without a free first dimension in every tensor; for others
    `dims` leave that dimension out, as Triton does.
    """
    pairs = list(served(plane, name, version))
    return oip.ModelConfigResponse(config=_config(name, pairs[0][1], len(pairs)))


def _config(name: str, instance: Instance, versions: int) -> oip.ModelConfig:
    batching = instance.batching
    batched = has_batch_axis(instance.inputs, instance.outputs)
    first = 1 if batched else 0
    config = oip.ModelConfig(
        name=name,
        platform=instance.platform,
        backend=instance.platform.partition("_")[0],
        max_batch_size=batching.max_batch if batched else 0,
        input=[
            oip.ModelInput(
                name=spec.name,
                data_type=_data_type(spec),
                dims=spec.shape[first:],
                optional=spec.name in instance.optional,
            )
            for spec in instance.inputs
        ],
        output=[
            oip.ModelOutput(name=spec.name, data_type=_data_type(spec), dims=spec.shape[first:])
            for spec in instance.outputs
        ],
        instance_group=[
            oip.ModelInstanceGroup(
                name=member.name,
                count=batching.slots,
                kind=oip.ModelInstanceGroup.KIND_CPU
                if member.name == "cpu"
                else oip.ModelInstanceGroup.KIND_MODEL,
            )
            for member in instance.members
        ],
        version_policy=oip.ModelVersionPolicy(
            latest=oip.ModelVersionPolicy.Latest(num_versions=versions)
        ),
        model_transaction_policy=oip.ModelTransactionPolicy(decoupled=False),
    )
    steps = ensemble_steps(instance)
    if steps:
        config.ensemble_scheduling.CopyFrom(
            oip.ModelEnsembling(
                step=[
                    oip.ModelEnsembling.Step(
                        model_name=step.model_name,
                        model_version=_number(step.version),
                        input_map=step.input_map,
                        output_map=step.output_map,
                    )
                    for step in steps
                ]
            )
        )
    elif batching.max_batch > 1:
        config.dynamic_batching.CopyFrom(
            oip.ModelDynamicBatching(
                preferred_batch_size=batching.preferred,
                max_queue_delay_microseconds=round(batching.max_delay * 1e6),
                preserve_ordering=False,
                priority_levels=LAST_PRIORITY,
                default_priority_level=DEFAULT_PRIORITY,
                default_queue_policy=oip.ModelQueuePolicy(
                    timeout_action=oip.ModelQueuePolicy.REJECT,
                    default_timeout_microseconds=round((instance.timeout or 0) * 1e6),
                    allow_timeout_override=True,
                    max_queue_size=batching.max_queue,
                ),
            )
        )
    config.parameters["model"].string_value = instance.model
    config.parameters["version"].string_value = instance.version
    return config


def _number(version: str) -> int:
    """Versions are text here and numbers there, -1 for any."""
    return int(version) if version.isascii() and version.isdecimal() and len(version) < 19 else -1


def _data_type(spec: TensorSpec) -> str:
    return "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"


def model_statistics(plane: DataPlane, name: str, version: str) -> oip.ModelStatisticsResponse:
    """Of one version, one model or everything. Raises ScoringError NOT_FOUND."""
    return oip.ModelStatisticsResponse(
        model_stats=[
            _statistics(endpoint, instance.version, instance.statistics.snapshot(instance.pending))
            for endpoint, instance in served(plane, name, version)
        ]
    )


def _statistics(name: str, version: str, snapshot: Snapshot) -> oip.ModelStatistics:
    return oip.ModelStatistics(
        name=name,
        version=version,
        last_inference=snapshot.last_inference,
        inference_count=snapshot.inference_count,
        execution_count=snapshot.execution_count,
        inference_stats=oip.InferStatistics(
            success=_duration(snapshot.success),
            fail=_duration(snapshot.fail),
            queue=_duration(snapshot.queue),
            compute_input=_duration(snapshot.compute_input),
            compute_infer=_duration(snapshot.compute_infer),
            compute_output=_duration(snapshot.compute_output),
            cache_hit=oip.StatisticDuration(),
            cache_miss=oip.StatisticDuration(),
        ),
        batch_stats=[
            oip.InferBatchStatistics(
                batch_size=batch.size,
                compute_input=_duration(batch.compute_input),
                compute_infer=_duration(batch.compute_infer),
                compute_output=_duration(batch.compute_output),
            )
            for batch in snapshot.batches
        ],
    )


def _duration(duration: Duration) -> oip.StatisticDuration:
    return oip.StatisticDuration(count=duration.count, ns=duration.ns)


def repository_index(plane: DataPlane, only_ready: bool) -> oip.RepositoryIndexResponse:
    return oip.RepositoryIndexResponse(
        models=[
            oip.RepositoryIndexResponse.ModelIndex(
                name=entry.name,
                version=entry.version,
                state=entry.state,
                reason=entry.reason,
            )
            for entry in index(plane, only_ready)
        ]
    )


def shared_memory_status(memory: SharedMemory, name: str) -> oip.SystemSharedMemoryStatusResponse:
    """Raises ScoringError NOT_FOUND."""
    answer = oip.SystemSharedMemoryStatusResponse()
    for region in memory.regions(name):
        answer.regions[region.name].CopyFrom(
            oip.SystemSharedMemoryStatusResponse.RegionStatus(
                name=region.name, key=region.key, offset=region.offset, byte_size=region.byte_size
            )
        )
    return answer


def trace_setting(request: oip.TraceSettingRequest) -> oip.TraceSettingResponse:
    """Raises ScoringError UNIMPLEMENTED for a change."""
    for key, setting in request.settings.items():
        if list(setting.value) not in ([], _TRACE.get(key)):
            raise _unchangeable("trace", key)
    answer = oip.TraceSettingResponse()
    for key, values in _TRACE.items():
        answer.settings[key].value.extend(values)
    return answer


def log_settings(request: oip.LogSettingsRequest) -> oip.LogSettingsResponse:
    """Raises ScoringError UNIMPLEMENTED for a change."""
    for key, setting in request.settings.items():
        chosen = setting.WhichOneof("parameter_choice")
        if key not in _LOG or chosen is None or getattr(setting, chosen) != _LOG[key]:
            raise _unchangeable("log", key)
    answer = oip.LogSettingsResponse()
    for key, value in _LOG.items():
        made = answer.settings[key]
        if isinstance(value, bool):
            made.bool_param = value
        elif isinstance(value, int):
            made.uint32_param = value
        else:
            made.string_param = value
    return answer


def _unchangeable(what: str, key: str) -> ScoringError:
    return ScoringError(
        Code.UNIMPLEMENTED,
        f"{what} setting {key!r} cannot be changed by a client; the device's configuration decides",
    )
