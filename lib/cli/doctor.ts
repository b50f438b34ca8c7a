/** `innerkv doctor`: what this installation found, chose and why. */
import { availableParallelism, cpus, freemem, totalmem } from 'node:os';
import { createBackend, type BackendInfo } from '../backend';
import { binding, bindingPath } from '../binding';
import { EXIT, type Command, type Values } from './command';
import { bytes, pairs } from './terminal';
import { version, versions } from './version';

interface Report {
  readonly ok: boolean;
  readonly versions: Record<string, string>;
  readonly machine: { processor: string; processors: number; memoryBytes: number; freeBytes: number };
  readonly binary?: { path: string; formatVersion: number };
  readonly backend?: BackendInfo;
  /** Why the addon or the backend does not work. */
  readonly problem?: { code: string; message: string };
}

function machine(): Report['machine'] {
  const limit = process.constrainedMemory(); // of the container; absent, 0 or absurdly large without one
  const total = totalmem();
  return {
    processor: cpus()[0]?.model.trim() ?? 'unknown',
    processors: availableParallelism(),
    memoryBytes: limit > 0 ? Math.min(limit, total) : total,
    freeBytes: freemem(),
  };
}

async function examine(): Promise<Report> {
  const base = { versions: versions(), machine: machine() };
  try {
    const binary = { path: bindingPath(), formatVersion: binding().formatVersion };
    await using backend = await createBackend();
    return { ok: true, ...base, binary, backend: { ...backend.info } };
  } catch (error) {
    if (!(error instanceof Error && 'code' in error)) throw error;
    return { ok: false, ...base, problem: { code: String(error.code), message: error.message } };
  }
}

function cudaVersion(number: number): string {
  return number === 0 ? 'none' : `${Math.floor(number / 1000)}.${Math.floor((number % 1000) / 10)}`;
}

function cublasLine(): string {
  const version = binding().cublasVersion();
  return version === 0
    ? 'not found; prefill uses a kernel of our own'
    : `${cudaVersion(version)}, for prefill`;
}

function cudaLines({ cuda }: BackendInfo): [string, string][] {
  if (!cuda.compiled) return [['CUDA', 'not compiled in']];
  const found = cuda.devices.map(
    ({ name, capability, totalBytes, multiprocessors }) =>
      `${name}, compute capability ${capability}, ${multiprocessors} multiprocessors, ${bytes(totalBytes)}`,
  );
  const versions = `compiled in; driver ${cudaVersion(cuda.driverVersion)}, runtime ${cudaVersion(cuda.runtimeVersion)}`;
  return [
    ['CUDA', cuda.error === null ? versions : `${versions}; ${cuda.error}`],
    ['CUDA devices', found.join('; ') || 'none'],
    ...(found.length ? [['cuBLAS', cublasLine()] as [string, string]] : []),
  ];
}

function print({ ok, versions, machine, binary, backend, problem }: Report): void {
  const lines: [string, string][] = [
    ['innerkv', version()],
    ['Node.js', `${versions.node ?? ''} on ${versions.platform ?? ''}`],
    ['processor', `${machine.processor}, ${machine.processors} usable`],
    ['memory', `${bytes(machine.memoryBytes)}, ${bytes(machine.freeBytes)} free`],
  ];
  if (binary) lines.push(['addon', `${binary.path}, page format ${binary.formatVersion}`]);
  if (backend) {
    const { kind, isa, availableIsas, threads, why } = backend;
    lines.push(
      ['backend', `${kind}: ${why}`],
      ['instructions', `${isa} of ${availableIsas.join(', ')}`],
      ['threads', String(threads)],
      ...cudaLines(backend),
    );
  }
  if (problem) lines.push(['problem', `${problem.message} (${problem.code})`]);
  lines.push(['result', ok ? 'ready' : 'NOT READY']);
  console.log(pairs(lines));
}

export const doctor: Command = {
  name: 'doctor',
  summary: 'say what was found, what is used and why',
  options: {},
  notes: 'Exit code 1 when the native addon cannot be loaded or no backend can be opened.',
  async run(values: Values) {
    const report = await examine();
    if (values.json) console.log(JSON.stringify(report, null, 2));
    else print(report);
    return report.ok ? EXIT.ok : EXIT.failed;
  },
};
