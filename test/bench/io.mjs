// Conversion from file to file beside `cp`, in turns, and `inspect` of a model of DeepSeek-V3's size. Both programs run
// as users run them; the built package is measured. Who goes first changes with every round, the ratio is the median of
// the rounds' own ratios, and nothing of what went before is under way: earlier outputs are removed and the disk is
// flushed outside of what is timed (removing 4 GB makes it discard blocks, and frees memory that a virtual machine gives
// back to its host: whoever writes next fetches it again, which has cost `cp` from 1 to 6 s). The input is in memory.
//   npm run bench:io [-- --gb 4] [-- --rounds 4] [-- --folder /tmp] [-- --only convert|inspect] [-- --json]
import { execFileSync, spawn } from 'node:child_process';
import { closeSync, fsyncSync, ftruncateSync, mkdirSync, mkdtempSync, openSync, readFileSync, readdirSync, rmSync, statfsSync, writeFileSync, writeSync } from 'node:fs'; // prettier-ignore
import { cpus, tmpdir, totalmem } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

const { values: options } = parseArgs({
  options: {
    gb: { type: 'string', default: '4' },
    rounds: { type: 'string', default: '4' },
    folder: { type: 'string', default: tmpdir() },
    only: { type: 'string' },
    json: { type: 'boolean', default: false },
  },
});
const bin = new URL('../../bin/deepseek-convert.js', import.meta.url).pathname;
const folder = mkdtempSync(join(options.folder, 'bench-io-'));
const say = (text) => options.json || console.log(text);

/** Runs a program; gives seconds, and the peak of its memory in bytes where the system tells. */
async function run(command, args) {
  const started = performance.now();
  const child = spawn(command, args, { stdio: ['ignore', 'ignore', 'pipe'] });
  let [errors, peak] = ['', 0];
  child.stderr.on('data', (text) => (errors += text));
  const look = setInterval(() => {
    try {
      peak = Number(/VmHWM:\s+(\d+)/.exec(readFileSync(`/proc/${child.pid}/status`, 'utf8'))?.[1] ?? 0) * 1024 || peak;
    } catch {
      // it has ended
    }
  }, 20);
  const code = await new Promise((resolve) => child.on('exit', resolve));
  clearInterval(look);
  if (code !== 0) throw new Error(`${command} ${args.join(' ')} ended with ${code}\n${errors}`);
  return { seconds: (performance.now() - started) / 1000, peak };
}

/** A safetensors header: 8 bytes of length, then the listing. */
function header(tensors) {
  let at = 0;
  const listing = {};
  for (const [name, { dtype, shape, bytes }] of tensors) {
    listing[name] = { dtype, shape, data_offsets: [at, at + bytes] };
    at += bytes;
  }
  const text = Buffer.from(JSON.stringify(listing));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  return { start: Buffer.concat([length, text]), size: 8 + text.length + at };
}

const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b);
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
};
const mb = (bytes) => `${Math.round(bytes / 1e6)} MB`;

/** Sharded bf16 weights of random bits that are finite. */
function makeWeights(path, total) {
  mkdirSync(path);
  const shape = [4096, 4096];
  const bytes = 2 * shape[0] * shape[1];
  const data = Buffer.alloc(bytes);
  let state = 1;
  for (let i = 0; i < bytes; i += 2) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    data.writeUInt16LE(0x3c00 | ((state >>> 16) & 0x81ff), i);
  }
  const count = Math.max(4, Math.round(total / bytes));
  const perShard = Math.max(1, Math.round(1e9 / bytes));
  const shards = Math.ceil(count / perShard);
  const map = {};
  for (let s = 0; s < shards; s++) {
    const name = `model-${String(s + 1).padStart(5, '0')}-of-${String(shards).padStart(5, '0')}.safetensors`;
    const tensors = [];
    for (let i = s * perShard; i < Math.min(count, (s + 1) * perShard); i++) {
      tensors.push([`model.layers.${i}.mlp.up_proj.weight`, { dtype: 'BF16', shape, bytes }]);
      map[tensors.at(-1)[0]] = name;
    }
    const fd = openSync(join(path, name), 'w');
    writeSync(fd, header(tensors).start);
    for (let i = 0; i < tensors.length; i++) writeSync(fd, data);
    fsyncSync(fd);
    closeSync(fd);
  }
  writeFileSync(join(path, 'model.safetensors.index.json'), JSON.stringify({ metadata: { total_size: count * bytes }, weight_map: map })); // prettier-ignore
  writeFileSync(join(path, 'config.json'), '{"model_type":"bench"}');
  return { bytes: count * bytes, tensor: bytes };
}

async function benchConvert() {
  const total = Number(options.gb) * 1e9;
  const { bavail, bsize } = statfsSync(folder);
  if (bavail * bsize < 2.2 * total) throw new Error(`${folder} has no room for twice ${options.gb} GB`);
  const input = join(folder, 'input');
  const { bytes, tensor } = makeWeights(input, total);
  const out = join(folder, 'out');
  const clear = () => {
    rmSync(out, { recursive: true, force: true });
    execFileSync('sync', ['-f', folder]);
  };
  const rounds = [];
  let written = 0;
  const programs = {
    cp: async (round) => {
      round.cp = (await run('cp', ['-r', input, out])).seconds;
      const started = performance.now();
      execFileSync('sync', ['-f', out]); // convert ends with everything on the disk
      round.durable = round.cp + (performance.now() - started) / 1000;
    },
    convert: async (round) => {
      const { seconds, peak } = await run(process.execPath, [bin, 'convert', input, '-o', out, '--shard-size', '1GB', '-q']); // prettier-ignore
      written = readdirSync(out).filter((name) => name.endsWith('.safetensors')).length;
      Object.assign(round, { convert: seconds, peak });
    },
  };
  for (let i = 0; i < Number(options.rounds); i++) {
    const round = {};
    for (const name of i % 2 ? ['convert', 'cp'] : ['cp', 'convert']) {
      clear();
      await programs[name](round);
    }
    rounds.push(round);
    say(`  cp ${round.cp.toFixed(2)} s, on the disk after ${round.durable.toFixed(2)} s; convert ${round.convert.toFixed(2)} s (${written} shards), peak ${mb(round.peak)}`); // prettier-ignore
  }
  clear();
  rmSync(input, { recursive: true });
  const of = (key) => median(rounds.map(key));
  const seconds = { cp: of((r) => r.cp), durable: of((r) => r.durable), convert: of((r) => r.convert) };
  const result = {
    bytes,
    seconds,
    ratio: of((r) => r.cp / r.convert),
    ratioDurable: of((r) => r.durable / r.convert),
    peak: Math.max(...rounds.map((r) => r.peak)),
    tensor,
  };
  say(`convert: ${(bytes / seconds.convert / 1e9).toFixed(2)} GB/s, ${result.ratio.toFixed(2)} x cp, ${result.ratioDurable.toFixed(2)} x cp and sync; peak memory ${mb(result.peak)} (one tensor is ${mb(tensor)})`); // prettier-ignore
  return result;
}

/** The order in which safetensors' own writer lists tensors. */
const asWritten = ([name, a], [other, b]) => dtypeOrder.indexOf(a.dtype) - dtypeOrder.indexOf(b.dtype) || (name < other ? -1 : 1); // prettier-ignore
const dtypeOrder = ['F32', 'BF16', 'F8_E4M3'];

/** Headers of DeepSeek-V3: 61 layers of 256 experts in FP8 with scales. The weights are holes in the files. */
function makeHeaders(path) {
  mkdirSync(path);
  const config = {
    model_type: 'deepseek_v3', architectures: ['DeepseekV3ForCausalLM'], vocab_size: 129280, hidden_size: 7168,
    intermediate_size: 18432, moe_intermediate_size: 2048, num_hidden_layers: 61, num_attention_heads: 128,
    num_key_value_heads: 128, n_shared_experts: 1, n_routed_experts: 256, num_experts_per_tok: 8, n_group: 8,
    topk_group: 4, first_k_dense_replace: 3, norm_topk_prob: true, routed_scaling_factor: 2.5, q_lora_rank: 1536,
    kv_lora_rank: 512, qk_rope_head_dim: 64, qk_nope_head_dim: 128, v_head_dim: 128, hidden_act: 'silu',
    max_position_embeddings: 4096, rms_norm_eps: 1e-6, rope_theta: 10000, scoring_func: 'sigmoid',
    topk_method: 'noaux_tc', tie_word_embeddings: false, torch_dtype: 'bfloat16', attention_bias: false,
    quantization_config: { quant_method: 'fp8', fmt: 'e4m3', activation_scheme: 'dynamic', weight_block_size: [128, 128] },
  }; // prettier-ignore
  const all = [];
  const plain = (name, dtype, ...shape) => all.push([name, { dtype, shape, bytes: shape.reduce((a, b) => a * b, dtype === 'F32' ? 4 : 2) }]); // prettier-ignore
  const fp8 = (name, n, k) => {
    all.push([`${name}.weight`, { dtype: 'F8_E4M3', shape: [n, k], bytes: n * k }]);
    plain(`${name}.weight_scale_inv`, 'F32', Math.ceil(n / 128), Math.ceil(k / 128));
  };
  plain('model.embed_tokens.weight', 'BF16', 129280, 7168);
  const mlp = (at, width) => {
    fp8(`${at}.gate_proj`, width, 7168);
    fp8(`${at}.up_proj`, width, 7168);
    fp8(`${at}.down_proj`, 7168, width);
  };
  for (let i = 0; i < 61; i++) {
    const at = `model.layers.${i}`;
    plain(`${at}.input_layernorm.weight`, 'BF16', 7168);
    plain(`${at}.post_attention_layernorm.weight`, 'BF16', 7168);
    fp8(`${at}.self_attn.q_a_proj`, 1536, 7168);
    plain(`${at}.self_attn.q_a_layernorm.weight`, 'BF16', 1536);
    fp8(`${at}.self_attn.q_b_proj`, 24576, 1536);
    fp8(`${at}.self_attn.kv_a_proj_with_mqa`, 576, 7168);
    plain(`${at}.self_attn.kv_a_layernorm.weight`, 'BF16', 512);
    fp8(`${at}.self_attn.kv_b_proj`, 32768, 512);
    fp8(`${at}.self_attn.o_proj`, 7168, 16384);
    if (i < 3) mlp(`${at}.mlp`, 18432);
    else {
      plain(`${at}.mlp.gate.weight`, 'BF16', 256, 7168);
      plain(`${at}.mlp.gate.e_score_correction_bias`, 'F32', 256);
      mlp(`${at}.mlp.shared_experts`, 2048);
      for (let e = 0; e < 256; e++) mlp(`${at}.mlp.experts.${e}`, 2048);
    }
  }
  plain('model.norm.weight', 'BF16', 7168);
  plain('lm_head.weight', 'BF16', 129280, 7168);
  const shards = 163;
  const map = {};
  let bytes = 0;
  for (let s = 0; s < shards; s++) {
    const name = `model-${String(s + 1).padStart(5, '0')}-of-00${shards}.safetensors`;
    const tensors = all.slice(Math.floor((s * all.length) / shards), Math.floor(((s + 1) * all.length) / shards));
    for (const [tensor] of tensors) map[tensor] = name;
    const { start, size } = header(tensors.sort(asWritten));
    const fd = openSync(join(path, name), 'w');
    writeSync(fd, start);
    ftruncateSync(fd, size);
    closeSync(fd);
    bytes += size;
  }
  writeFileSync(join(path, 'model.safetensors.index.json'), JSON.stringify({ metadata: {}, weight_map: map }));
  writeFileSync(join(path, 'config.json'), JSON.stringify(config));
  return { tensors: all.length, shards, bytes };
}

async function benchInspect() {
  const path = join(folder, 'headers');
  const made = makeHeaders(path);
  const runs = [];
  for (let i = 0; i < Math.max(3, Number(options.rounds)); i++) runs.push(await run(process.execPath, [bin, 'inspect', path])); // prettier-ignore
  const seconds = median(runs.map((one) => one.seconds));
  const peak = Math.max(...runs.map((one) => one.peak));
  say(`inspect: ${made.tensors} tensors in ${made.shards} shards (${(made.bytes / 1e9).toFixed(0)} GB): ${seconds.toFixed(2)} s, best ${Math.min(...runs.map((one) => one.seconds)).toFixed(2)} s, peak ${mb(peak)}`); // prettier-ignore
  return { ...made, seconds, peak };
}

const machine = { cpu: cpus()[0].model, threads: cpus().length, memory: totalmem() };
try {
  say(`${machine.cpu}, ${machine.threads} threads, ${mb(machine.memory)}`);
  const convert = options.only === 'inspect' ? undefined : await benchConvert();
  const inspect = options.only === 'convert' ? undefined : await benchInspect();
  if (options.json) console.log(JSON.stringify({ machine, convert, inspect }));
} finally {
  rmSync(folder, { recursive: true, force: true });
}
