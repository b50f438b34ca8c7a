/** llama.cpp through node-llama-cpp, in a process of its own: benchmarks/llama-cpp. */
import { fork, type ChildProcess } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { UsageError } from '../../lib/cli/command';
import { type Contender, type Step, type Timing } from './contender';

const FOLDER = join(__dirname, '..', 'llama-cpp');

/** Stored bits per number. */
const types: Readonly<Record<string, number>> = { f16: 16, q8_0: 8.5, q4_0: 4.5 };

export interface PeerOptions {
  /** A GGUF file. */
  readonly model: string;
  readonly type: string;
  readonly threads: number;
  readonly contextSize: number;
  readonly chunk: number;
}

export interface PeerFacts {
  readonly name: string;
  readonly version: string;
  readonly flashAttention: boolean;
  readonly threads: number;
  /** What its build uses of this processor. */
  readonly systemInfo: string;
}

type Reply = { readonly result: unknown } | { readonly error: string };

export class Peer implements Contender {
  readonly peer = true;
  readonly name: string;
  readonly bitsPerValue: number;

  private constructor(
    private readonly child: ChildProcess,
    type: string,
    readonly about: PeerFacts,
  ) {
    this.name = `llama.cpp ${type}`;
    this.bitsPerValue = types[type]!;
  }

  static async create(options: PeerOptions): Promise<Peer> {
    if (!(options.type in types))
      throw new UsageError(`--peer must be of ${Object.keys(types).join(', ')}, not "${options.type}"`);
    if (!existsSync(join(FOLDER, 'node_modules')))
      throw new UsageError('--peer needs its packages: npm ci --prefix benchmarks/llama-cpp');
    const child = fork(join(FOLDER, 'worker.mjs'), {
      stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
      execArgv: [],
    });
    return new Peer(child, options.type, (await call(child, 'open', options)) as PeerFacts);
  }

  async prefill(tokens: Int32Array): Promise<Timing> {
    return (await call(this.child, 'prefill', [...tokens])) as Timing;
  }

  async decode(token: number, count: number): Promise<Step[]> {
    return (await call(this.child, 'decode', { token, count })) as Step[];
  }

  cacheBytes(): undefined {
    return undefined;
  }

  async close(): Promise<void> {
    this.child.kill();
    await Promise.resolve();
  }
}

function call(child: ChildProcess, method: string, argument: unknown): Promise<unknown> {
  return new Promise((resolve, reject) => {
    const gone = (code: number | null) => {
      reject(new Error(`The process of llama.cpp ended (${String(code)}).`));
    };
    child.once('exit', gone);
    child.once('message', (reply: Reply) => {
      child.off('exit', gone);
      if ('error' in reply) reject(new Error(reply.error));
      else resolve(reply.result);
    });
    child.send({ method, argument });
  });
}
