"""The backend "onnx_export": a packed model as a folder for ONNX Runtime, and that folder run there.

Only `runtime` and `backend` can be imported without the packages of the extra [onnx].
"""
