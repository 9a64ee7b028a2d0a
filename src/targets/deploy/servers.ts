import { batching, here, quoted, script, warnings, type Deployed } from './batching.js';

const { maxBatchSize, maxWaitMs } = batching;

/** vLLM batches continuously: a request joins the running batch at the next step. */
export const vllm = (model: Deployed): Map<string, string> =>
  new Map([
    [
      'serve-vllm.sh',
      script([
        ...warnings([
          `vLLM knows no max_wait_ms (${maxWaitMs} ms asked): it batches continuously and waits for nobody.`,
          'vLLM knows no longest_first order: first come, first served.',
        ]),
        here,
        `exec vllm serve "$here" --served-model-name ${quoted(model.name)} --max-model-len ${model.context} \\`,
        `  --max-num-seqs ${maxBatchSize} --tensor-parallel-size ${model.tensorParallel} --port 8000 "$@"`,
      ]),
    ],
  ]);

/** SGLang orders by longest output first (`lof`), which is as near to longest_first as it has. */
export const sglang = (model: Deployed): Map<string, string> =>
  new Map([
    [
      'serve-sglang.sh',
      script([
        ...warnings([
          `SGLang knows no max_wait_ms (${maxWaitMs} ms asked): it batches continuously and waits for nobody.`,
          'longest_first is SGLang’s lof: longest output first.',
        ]),
        here,
        `exec python3 -m sglang.launch_server --model-path "$here" --served-model-name ${quoted(model.name)} \\`,
        `  --context-length ${model.context} --max-running-requests ${maxBatchSize} --schedule-policy lof \\`,
        `  --tp ${model.tensorParallel} --enable-metrics --port 30000 "$@"`,
      ]),
    ],
  ]);

/** llama.cpp's server: as many slots as the batch has places, each with a context of its own. */
export const llamaCpp = (model: Deployed): Map<string, string> =>
  new Map([
    [
      'serve-llama.cpp.sh',
      script([
        ...warnings([
          `llama.cpp knows no max_wait_ms (${maxWaitMs} ms asked): it batches continuously and waits for nobody.`,
          'llama.cpp knows no longest_first order: first come, first served.',
          'The context is shared by all slots: lower --parallel where memory is short.',
        ]),
        here,
        `exec llama-server --model "$here/model.gguf" --alias ${quoted(model.name)} \\`,
        `  --ctx-size ${model.context * maxBatchSize} --parallel ${maxBatchSize} --cont-batching --metrics --port 8080 "$@"`,
      ]),
    ],
  ]);

/**
 * Triton with its vLLM backend: a model repository is a folder `<name>` with config.pbtxt and `1/model.json`; the script
 * makes it beside the weights and starts the server.
 */
export function triton(model: Deployed): Map<string, string> {
  const config = [
    '# Triton Inference Server, vLLM backend. The backend batches by itself: max_batch_size is its own, max_num_seqs.',
    '# warning: the backend knows no longest_first order; requests are taken as they come.',
    'backend: "vllm"',
    'max_batch_size: 0',
    'model_transaction_policy { decoupled: true }',
    'input [ { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] },',
    '        { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true },',
    '        { name: "sampling_parameters" data_type: TYPE_STRING dims: [ 1 ] optional: true } ]',
    'output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]',
    'instance_group [ { count: 1 kind: KIND_MODEL } ]',
    "# vLLM's own metrics (latencies, tokens) appear on Triton's port with this alone.",
    'parameters: { key: "REPORT_CUSTOM_METRICS" value: { string_value: "true" } }',
    '',
  ].join('\n');
  const engine = {
    model: 'MODEL_FOLDER',
    max_model_len: model.context,
    max_num_seqs: maxBatchSize,
    tensor_parallel_size: model.tensorParallel,
    disable_log_stats: false,
  };
  const name = model.name.replace(/[^\w.-]/g, '_');
  const start = script([
    ...warnings([`The vLLM backend knows no max_wait_ms (${maxWaitMs} ms asked): it batches continuously.`]),
    here,
    `repository=\${1:-"$here-triton"}`,
    `mkdir -p "$repository/${name}/1"`,
    `cp "$here/triton-config.pbtxt" "$repository/${name}/config.pbtxt"`,
    `sed "s|MODEL_FOLDER|$here|" "$here/triton-model.json" > "$repository/${name}/1/model.json"`,
    'exec tritonserver --model-repository "$repository" --metrics-port 8002',
  ]);
  return new Map([
    ['serve-triton.sh', start],
    ['triton-config.pbtxt', config],
    ['triton-model.json', `${JSON.stringify(engine, null, 2)}\n`],
  ]);
}
