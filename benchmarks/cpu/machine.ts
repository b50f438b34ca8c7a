/** What a result depends on: the machine, the build, the moment, and how fast memory is copied there and then. */
import { execFileSync, type StdioOptions } from 'node:child_process';
import { availableParallelism, cpus, loadavg, totalmem } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { versions } from '../../lib/cli/version';

const ROOT = join(__dirname, '..', '..');

export interface Machine {
  readonly processor: string;
  readonly processors: number;
  readonly memoryBytes: number;
  readonly versions: Record<string, string>;
  /** Runnable tasks of the last minute, at the end: more than the threads measured means that others ran too. */
  readonly load: number;
  /** ISO 8601. */
  readonly date: string;
  /** Commit of the sources; ends in "-dirty" when they were changed since. */
  readonly commit: string;
}

export function describeMachine(): Machine {
  return {
    processor: cpus()[0]?.model.trim() ?? 'unknown',
    processors: availableParallelism(),
    memoryBytes: totalmem(),
    versions: versions(),
    load: loadavg()[0]!,
    date: new Date().toISOString(),
    commit: commit(),
  };
}

function commit(): string {
  try {
    const quiet: StdioOptions = ['ignore', 'pipe', 'ignore'];
    const args = ['describe', '--always', '--dirty', '--exclude=*'];
    return execFileSync('git', args, { cwd: ROOT, encoding: 'utf8', stdio: quiet }).trim();
  } catch {
    return 'unknown'; // no git, or no checkout
  }
}

const COPY_BYTES = 2 ** 27;
const COPIES = 6;

/** Runs in a worker: copies between two arrays far larger than any cache and reports the time. */
const COPIER = `
  const { parentPort, workerData: { bytes, copies, gate } } = require('node:worker_threads');
  const from = new Uint8Array(bytes).fill(1), to = new Uint8Array(bytes).fill(2);
  const ready = new Int32Array(gate);
  Atomics.add(ready, 0, 1);
  Atomics.wait(ready, 1, 0);
  const started = performance.now();
  for (let i = 0; i < copies; i++) to.set(from);
  parentPort.postMessage(performance.now() - started);
`;

/** Copied bytes per second of `threads` threads at once, in GB/s; reading and writing make twice that traffic. */
export async function copyBandwidth(threads: number): Promise<number> {
  const gate = new Int32Array(new SharedArrayBuffer(8));
  const workerData = { bytes: COPY_BYTES, copies: COPIES, gate: gate.buffer };
  const times = Array.from(
    { length: threads },
    () =>
      new Promise<number>((resolve, reject) => {
        new Worker(COPIER, { eval: true, workerData }).once('message', resolve).once('error', reject);
      }),
  );
  const started = new Promise<void>((resolve) => {
    const poll = () => (Atomics.load(gate, 0) === threads ? resolve() : void setTimeout(poll, 1));
    poll();
  });
  await Promise.race([started, ...times]); // a worker that fails rejects
  Atomics.store(gate, 1, 1);
  Atomics.notify(gate, 1);
  const slowest = Math.max(...(await Promise.all(times)));
  return (threads * COPIES * COPY_BYTES) / (slowest / 1000) / 1e9;
}
