#!/usr/bin/env bash
# Prints the Secrets that the manifests name; no value of them is kept in the repository. Keys come from the environment, passwords
# are drawn here, so run it once for a cluster:
#   export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... AWS_REGION=... MLFLOW_ARTIFACTS=s3://my-bucket/mlflow
#   infra/kuberay/make_secrets.sh | kubectl create -f -
# Optional: AWS_ENDPOINT_URL_S3 for a store that is not AWS, HF_TOKEN for gated models, SANA_API_KEYS for the clients of a server. On EKS or GKE, where pods get keys from a
# service account, give no AWS keys at all.
set -euo pipefail

secret() {  # name key=value...
    local name="$1"; shift
    kubectl create secret generic "$name" --namespace sana --dry-run=client --output yaml "${@/#/--from-literal=}"
    echo ---
}

password() { head -c 32 /dev/urandom | base64 | tr -dc 'a-zA-Z0-9'; }

: "${MLFLOW_ARTIFACTS:?set MLFLOW_ARTIFACTS=s3://bucket/folder, where MLflow keeps artifacts}"
s3=("MLFLOW_ARTIFACTS=$MLFLOW_ARTIFACTS")
for name in AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_REGION AWS_ENDPOINT_URL_S3; do
    if [[ -n "${!name:-}" ]]; then s3+=("$name=${!name}"); fi
done
secret sana-s3 "${s3[@]}"
secret sana-redis "password=$(password)"
secret sana-postgres "password=$(password)"
if [[ -n "${HF_TOKEN:-}" ]]; then secret sana-hugging-face "token=$HF_TOKEN"; fi
if [[ -n "${SANA_API_KEYS:-}" ]]; then secret sana-api-keys "keys=$SANA_API_KEYS"; fi
