"""MLflow, as the other rooms use it."""

import os

# A job tells MLflow's makers nothing of itself, unless its user wishes so. Their client also changes the environment from a
# thread, while MLflow copies it elsewhere: now and then a job ended with KeyError '_MLFLOW_TELEMETRY_SESSION_ID'.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# It tells that it makes its tables, in a job's own output. Warnings stay.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
