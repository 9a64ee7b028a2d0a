// Builds build/deepseek_convert.node (CPU backend inside) with g++ alone and, with --cuda,
// build/libdeepseek_convert_cuda.so with nvcc (minutes: six GPU generations). Incremental: an object is rebuilt when a header, its source or its flags change.
//   node scripts/build-native.mjs [--debug] [--sanitize] [--out folder] [--cuda] [--cuda-arch 90a,...]
import { spawn, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const { values: options } = parseArgs({
  options: {
    debug: { type: 'boolean', default: false },
    sanitize: { type: 'boolean', default: false },
    out: { type: 'string', default: 'build' },
    cuda: { type: 'boolean', default: false },
    'cuda-arch': { type: 'string', default: '80,86,89,90a,100,120' },
  },
});
const out = join(root, options.out);
const fail = (message) => {
  console.error(message);
  process.exit(1);
};

const compiler = process.env.CXX ?? 'g++';
if (spawnSync(compiler, ['--version']).status !== 0) {
  fail(
    `No C++ compiler: "${compiler}" did not run. deepseek-convert builds its native core from source.\n` +
      '  Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) or point CXX at it, then: npm run build:native',
  );
}
mkdirSync(join(out, 'obj'), { recursive: true });

// One build at a time in one folder; a lock left by a dead process is taken over.
const lock = join(out, 'build.lock');
for (;;) {
  try {
    writeFileSync(lock, String(process.pid), { flag: 'wx' });
    break;
  } catch {
    let owner = 0;
    try {
      owner = Number(readFileSync(lock, 'utf8'));
      process.kill(owner, 0);
    } catch (error) {
      if (error.code === 'ESRCH' || error.code === 'ENOENT' || !owner) {
        rmSync(lock, { force: true });
        continue;
      }
    }
    await new Promise((resume) => setTimeout(resume, 300));
  }
}
process.on('exit', () => rmSync(lock, { force: true }));
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(130));

const require = createRequire(import.meta.url);
const includes = [
  join(root, 'native'),
  join(dirname(require.resolve('node-api-headers/package.json')), 'include'),
  dirname(require.resolve('node-addon-api/package.json')),
];
const x64 = process.arch === 'x64';
const common = [
  '-std=c++17', '-fPIC', '-pthread', '-Wall', '-Wextra', '-fvisibility=hidden', '-fno-math-errno', '-ffp-contract=off',
  ...(options.debug || options.sanitize ? ['-O1', '-g'] : ['-O3']),
  ...(options.sanitize ? ['-fsanitize=address,undefined', '-fno-sanitize-recover=undefined', '-fno-omit-frame-pointer'] : []),
  '-DNAPI_VERSION=9', '-DNODE_ADDON_API_DISABLE_DEPRECATED', '-DNAPI_CPP_EXCEPTIONS',
  ...includes.map((folder) => `-I${folder}`),
]; // prettier-ignore

// native/cpu/kernels/X.cc is compiled once per instruction set, with DC_ISA naming it; the rest once, for any machine.
const isas = x64
  ? {
      base: ['-mtune=generic', '-O2'], // small rather than fast: for processors without AVX2
      avx2: ['-mavx2', '-mfma', '-mf16c'],
      avx512: ['-mavx2', '-mfma', '-mf16c', '-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512dq'],
    }
  : { base: [] }; // prettier-ignore

const list = (folder, ending) =>
  existsSync(join(root, folder))
    ? readdirSync(join(root, folder)).filter((name) => name.endsWith(ending)).sort().map((name) => join(folder, name))
    : []; // prettier-ignore
const headersHash = (folders) => {
  const hash = createHash('sha256');
  for (const folder of folders) {
    for (const name of [...list(folder, '.h'), ...list(folder, '.inc'), ...list(folder, '.cuh')]) hash.update(readFileSync(join(root, name)));
  }
  return hash.digest('hex');
}; // prettier-ignore

const cpuHeaders = headersHash(['native', 'native/cpu', 'native/cpu/kernels']);
const jobs = [];
const object = (source, name, command, flags, headers) => {
  const file = join(out, 'obj', `${name}.o`);
  const key = createHash('sha256').update(readFileSync(join(root, source))).update(headers).update([command, ...flags].join(' ')).digest('hex');
  const stamp = `${file}.key`;
  if (!(existsSync(file) && existsSync(stamp) && readFileSync(stamp, 'utf8') === key)) {
    jobs.push({ label: relative(root, join(root, source)) + (name.includes('@') ? ` (${name.split('@')[1]})` : ''), command, args: [...flags, '-c', join(root, source), '-o', file], stamp, key });
  }
  return file;
}; // prettier-ignore

const run = (command, args) =>
  new Promise((resolve, reject) => {
    const child = spawn(command, args, { stdio: ['ignore', 'inherit', 'inherit'] });
    child.on('error', reject);
    child.on('close', (code) =>
      code === 0 ? resolve() : reject(new Error(`${command} exited with ${code}: ${args.at(-1)}`)),
    );
  });
async function runJobs() {
  const queue = jobs.splice(0);
  const total = queue.length;
  let failed;
  const worker = async () => {
    for (let job = queue.shift(); job && !failed; job = queue.shift()) {
      console.error(`[${total - queue.length}/${total}] ${job.label}`);
      try {
        rmSync(job.stamp, { force: true });
        await run(job.command, job.args);
        writeFileSync(job.stamp, job.key);
      } catch (error) {
        failed = error;
      }
    }
  };
  await Promise.all(Array.from({ length: availableParallelism() }, worker));
  if (failed) fail(`Native build failed: ${failed.message}`);
  return total;
}
async function link(command, args, file, objects, rebuilt) {
  if (!rebuilt && existsSync(file) && objects.every((o) => statSync(o).mtimeMs <= statSync(file).mtimeMs)) return;
  const temporary = `${file}.${process.pid}`;
  await run(command, [...args, ...objects, '-o', temporary]).catch((error) =>
    fail(`Native build failed: ${error.message}`),
  );
  renameSync(temporary, file); // by rename: a process that has the old one loaded keeps it
}

// Products on the processor's units for bf16.
const units = ['native/cpu/kernels/gemm_amx.cc', 'native/cpu/kernels/gemm_bf16.cc'];
const bf16 = x64 ? [...isas.avx512, '-mavx512bf16', '-mamx-tile', '-mamx-bf16'] : [];
const kernel = (source, isa, flags) =>
  object(source, `${flat(source)}@${isa}`, compiler, [...common, ...flags, `-DDC_ISA=${isa}`], cpuHeaders); // prettier-ignore
const flat = (source) => source.replace(/^native\//, '').replaceAll('/', '_');
const objects = [
  ...[...list('native', '.cc'), ...list('native/cpu', '.cc')].map((source) => object(source, flat(source), compiler, common, cpuHeaders)),
  ...list('native/cpu/kernels', '.cc').filter((source) => !units.includes(source)).flatMap((source) =>
    Object.entries(isas).map(([isa, flags]) => kernel(source, isa, flags)),
  ),
  // With their instructions emulated as well: tests run them so on any processor.
  ...(x64 ? units : []).flatMap((source) => [kernel(source, 'amx', bf16), kernel(source, 'tiles', [...isas.avx2, '-Os'])]),
]; // prettier-ignore
const rebuilt = await runJobs();
await link(compiler, ['-shared', '-pthread', ...(options.sanitize ? ['-fsanitize=address,undefined'] : ['-s'])], join(out, 'deepseek_convert.node'), objects, rebuilt); // prettier-ignore

// CUDA: a plain C shared library of its own, loaded when a GPU is there.
const nvcc = [
  process.env.CUDA_HOME && join(process.env.CUDA_HOME, 'bin/nvcc'),
  'nvcc',
  '/usr/local/cuda/bin/nvcc',
].filter((path) => path && spawnSync(path, ['--version']).status === 0)[0];
if (!options.cuda) {
  console.error(`CPU core ready: ${relative(root, out)}/deepseek_convert.node. CUDA module: npm run build:cuda${nvcc ? '' : ' (needs nvcc)'}.`); // prettier-ignore
} else if (!nvcc) {
  fail(
    'The CUDA module needs nvcc (CUDA 12.8 or newer), which was not found: install the CUDA toolkit or set CUDA_HOME.',
  );
} else {
  const arches = options['cuda-arch'].split(',');
  const newest = arches.at(-1).replace(/\D/g, '');
  const gencode = [
    ...arches.map((arch) => `-gencode=arch=compute_${arch},code=sm_${arch}`),
    `-gencode=arch=compute_${newest},code=compute_${newest}`,
  ];
  const flags = ['-std=c++17', '-O3', '-lineinfo', '--threads=2', '-cudart=static', '-Xcompiler=-fPIC,-fvisibility=hidden,-Wall', `-I${join(root, 'native')}`, ...gencode]; // prettier-ignore
  const cudaHeaders = headersHash(['native', 'native/cuda']);
  const cudaObjects = list('native/cuda', '.cu').map((source) => object(source, flat(source), nvcc, flags, cudaHeaders)); // prettier-ignore
  const cudaRebuilt = await runJobs();
  await link(nvcc, ['-shared', '-cudart=static', '-Xlinker=-s', ...gencode], join(out, 'libdeepseek_convert_cuda.so'), cudaObjects, cudaRebuilt); // prettier-ignore
  console.error(`CPU core and CUDA module (${arches.map((arch) => `sm_${arch}`).join(' ')}) built.`);
}
