"""The stub of the Open Inference Protocol.

Apart from services.py: the control plane does without these messages, and their memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import open_inference_pb2 as oip
from .services import Bidirectional, Stub, Unary

if TYPE_CHECKING:
    import grpc  # noqa: F401 - in a string below

INFERENCE = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"]


class InferenceStub(Stub["grpc.Channel"]):
    service = INFERENCE
    server_live: Unary[oip.ServerLiveRequest, oip.ServerLiveResponse]
    server_ready: Unary[oip.ServerReadyRequest, oip.ServerReadyResponse]
    model_ready: Unary[oip.ModelReadyRequest, oip.ModelReadyResponse]
    server_metadata: Unary[oip.ServerMetadataRequest, oip.ServerMetadataResponse]
    model_metadata: Unary[oip.ModelMetadataRequest, oip.ModelMetadataResponse]
    model_infer: Unary[oip.ModelInferRequest, oip.ModelInferResponse]
    model_stream_infer: Bidirectional[oip.ModelInferRequest, oip.ModelStreamInferResponse]
    model_config: Unary[oip.ModelConfigRequest, oip.ModelConfigResponse]
    model_statistics: Unary[oip.ModelStatisticsRequest, oip.ModelStatisticsResponse]
    repository_index: Unary[oip.RepositoryIndexRequest, oip.RepositoryIndexResponse]
    repository_model_load: Unary[oip.RepositoryModelLoadRequest, oip.RepositoryModelLoadResponse]
    repository_model_unload: Unary[
        oip.RepositoryModelUnloadRequest, oip.RepositoryModelUnloadResponse
    ]
    system_shared_memory_status: Unary[
        oip.SystemSharedMemoryStatusRequest, oip.SystemSharedMemoryStatusResponse
    ]
    system_shared_memory_register: Unary[
        oip.SystemSharedMemoryRegisterRequest, oip.SystemSharedMemoryRegisterResponse
    ]
    system_shared_memory_unregister: Unary[
        oip.SystemSharedMemoryUnregisterRequest, oip.SystemSharedMemoryUnregisterResponse
    ]
    cuda_shared_memory_status: Unary[
        oip.CudaSharedMemoryStatusRequest, oip.CudaSharedMemoryStatusResponse
    ]
    cuda_shared_memory_register: Unary[
        oip.CudaSharedMemoryRegisterRequest, oip.CudaSharedMemoryRegisterResponse
    ]
    cuda_shared_memory_unregister: Unary[
        oip.CudaSharedMemoryUnregisterRequest, oip.CudaSharedMemoryUnregisterResponse
    ]
    trace_setting: Unary[oip.TraceSettingRequest, oip.TraceSettingResponse]
    log_settings: Unary[oip.LogSettingsRequest, oip.LogSettingsResponse]
