/** `npm run bench -- cuda`: attention, append and bulk quantisation of the GPU backend's own kernels, against a copy. */
import { spawnSync } from 'node:child_process';
import { existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { KvError } from '../lib';
import { EXIT, UsageError, count, list, text, type Command, type Values } from '../lib/cli/command';
import { describeMachine } from './cpu/machine';
import { renderCudaReport, type CudaReport } from './cuda/report';

const ROOT = join(__dirname, '..');
const PROGRAM = 'innerkv_cuda_bench';
/** What a program says that cannot run here. */
const NOT_RUN = 77;

export const cuda: Command = {
  name: 'cuda',
  summary: 'decode attention and append of every scheme on a GPU',
  options: {
    batch: { value: 'N,…', help: 'sequences of one call', default: '1,8,32' },
    tokens: { value: 'N,…', help: 'tokens of a sequence, multiples of 128', default: '1K,4K,32K,128K' },
    schemes: { value: 'NAME,…', help: 'schemes to time (default: all; the first is the baseline fp16)' },
    repeats: { value: 'N', help: 'timed calls; medians are taken over them', default: '25' },
    seconds: { value: 'N', help: 'cells that begin later are skipped, and say so', default: '150' },
    binary: {
      value: 'FILE',
      help: `${PROGRAM} (default: the one in build-gpu, which is built when missing)`,
    },
    from: { value: 'FILE', help: 'render the JSON of an earlier run instead of measuring' },
    out: { value: 'FILE', help: 'also write FILE.json and FILE.md' },
  },
  notes:
    'One decode step of one layer: 32 query heads over 8 KV heads of 128 channels, windows of 32 + 96 tokens, the L2 cache\n' +
    'overwritten before every call. Kernels are timed with events; copies of arguments and results are not in the times.\n' +
    '"o1" in a name: the largest number of each key and value is kept apart, 1 of 128 channels or 0.78 %.',
  run(values: Values) {
    const out = text(values, 'out');
    const from = text(values, 'from');
    const measured = from === undefined ? measure(values) : readReport(from);
    const report: CudaReport = from === undefined ? { ...measured, machine: describeMachine() } : measured;
    const [json, markdown] = [`${JSON.stringify(report, null, 2)}\n`, renderCudaReport(report)];
    if (out !== undefined) {
      writeFileSync(`${out}.json`, json);
      writeFileSync(`${out}.md`, markdown);
    }
    process.stdout.write(values.json ? json : markdown);
    return EXIT.ok;
  },
};

function readReport(path: string): CudaReport {
  // eslint-disable-next-line @typescript-eslint/no-require-imports -- a JSON file that the user names
  const report = require(join(process.cwd(), path)) as Partial<CudaReport>;
  if (report.benchmark !== 'cuda') throw new UsageError(`${path} is no result of this benchmark`);
  return report as CudaReport;
}

function numbers(values: Values, name: string): string {
  return list(values, name)!.map((one) => count({ [name]: one }, name)).join(','); // prettier-ignore
}

function measure(values: Values): Omit<CudaReport, 'machine'> {
  const schemes = list(values, 'schemes');
  const args = ['batch', 'tokens', 'repeats', 'seconds'].flatMap((name) => [
    `--${name}`,
    numbers(values, name),
  ]);
  if (schemes) args.push('--schemes', schemes.join(','));
  const binary = text(values, 'binary') ?? join(ROOT, 'build-gpu', PROGRAM);
  if (!existsSync(binary)) build(binary);
  const { status, stdout, error } = spawnSync(binary, args, {
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'inherit'],
    maxBuffer: 2 ** 26,
  });
  if (status === NOT_RUN)
    throw new KvError('ERR_INNERKV_UNSUPPORTED', 'There is no usable CUDA device to measure.');
  if (status !== 0) throw error ?? new Error(`${binary} ended with ${status}`);
  return JSON.parse(stdout) as CudaReport;
}

function build(binary: string): void {
  if (!binary.startsWith(join(ROOT, 'build-gpu'))) throw new UsageError(`there is no ${binary}`);
  const steps = [
    ['-S', ROOT, '-B', join(ROOT, 'build-gpu'), '-DINNERKV_CUDA=ON'],
    ['--build', join(ROOT, 'build-gpu'), '--target', PROGRAM, '-j', '2'],
  ];
  for (const step of steps) {
    const { status } = spawnSync('cmake', step, { stdio: ['ignore', 2, 2] });
    if (status !== 0)
      throw new KvError(
        'ERR_INNERKV_UNSUPPORTED',
        `${PROGRAM} cannot be built here: it needs cmake and nvcc.`,
      );
  }
}
