/** `npm run bench -- model`: prefill and decoding of a real model through the cache, beside llama.cpp if it is installed. */
import { existsSync, writeFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join, resolve } from 'node:path';
import { createBackend } from '../lib';
import { EXIT, UsageError, count, list, text, type Command, type Values } from '../lib/cli/command';
import { Progress } from '../lib/cli/terminal';
import { calibrate } from '../lib/eval';
import { Model } from '../lib/model';
import { describeMachine } from './cpu/machine';
import { Ours, type Contender } from './model/contender';
import { measure } from './model/measure';
import { Peer } from './model/peer';
import { renderReport, type Report } from './model/report';

const SMOLLM2 = join('models', 'smollm2-135m', 'smollm2-135m-instruct.q4_1.gguf');
const SCHEMES =
  'fp16,q8,rotated-k4v4,rotated-k3v3,rotated-k2v2,calibrated-k4v4,calibrated-k3v3,calibrated-k2v2';
const CALIBRATION_TOKENS = 512;

export const model: Command = {
  name: 'model',
  summary: 'prefill and decoding of a model through the cache of every scheme',
  options: {
    model: { value: 'FILE', help: 'model (default: SmolLM2-135M in the folder INNERKV_DATA)' },
    contexts: { value: 'N,…', help: 'tokens in the cache while decoding is timed', default: '64,4096,7900' },
    schemes: { value: 'NAME,…', help: 'schemes to time', default: SCHEMES },
    peer: { value: 'TYPE,…', help: 'cache types of llama.cpp to time in turn: f16, q8_0, q4_0' },
    backend: { value: 'cpu|cuda', help: 'where the model and its caches live', default: 'cpu' },
    threads: { value: 'N', help: 'threads of every contender (default: all the process may use)' },
    rounds: { value: 'N', help: 'rounds of decoding; medians are taken over them', default: '7' },
    tokens: { value: 'N', help: 'tokens decoded by each contender in a round', default: '8' },
    chunk: { value: 'N', help: 'tokens prefilled by each contender in turn', default: '512' },
    activations: { value: 'TYPE', help: 'int8 or float32', default: 'int8' },
    out: { value: 'FILE', help: 'also write FILE.json and FILE.md' },
  },
  notes:
    'All contenders take turns, chunk by chunk and round by round, so what else the machine does falls on all of them. Prompts\n' +
    'are pseudo-random tokens; decoding is greedy and is undone after each round. --peer needs `npm ci` in\n' +
    'benchmarks/llama-cpp; see the file README.md there.',
  async run(values: Values) {
    const path = text(values, 'model') ?? defaultModel();
    const contexts = list(values, 'contexts')!.map((one) => count({ contexts: one }, 'contexts'));
    const threads = values.threads === undefined ? availableParallelism() : count(values, 'threads');
    const activations = text(values, 'activations');
    if (activations !== 'int8' && activations !== 'float32')
      throw new UsageError(`--activations must be int8 or float32, not "${activations ?? ''}"`);
    const [rounds, tokens, chunk] = [
      count(values, 'rounds'),
      count(values, 'tokens'),
      count(values, 'chunk'),
    ];
    const device = text(values, 'backend');
    if (device !== 'cpu' && device !== 'cuda')
      throw new UsageError(`--backend must be cpu or cuda, not "${device ?? ''}"`);
    const names = list(values, 'schemes')!;
    const types = list(values, 'peer') ?? [];
    const out = text(values, 'out');

    await using backend = await createBackend({ backend: device, threads });
    using opened = await Model.open(backend, path, { activations });
    const { vocabulary, contextLength } = opened.config;
    const longest = Math.max(...contexts) + tokens + 2;
    if (longest > contextLength)
      throw new UsageError(
        `--contexts: ${longest} tokens with what is decoded, but the model has ${contextLength}`,
      );
    const prompt = Int32Array.from({ length: Math.max(...contexts) }, (_, i) => (i * 7919 + 5) % vocabulary);

    const progress = new Progress();
    const contenders: Contender[] = [];
    let peer: Report['peer'];
    try {
      const moments = names.some((name) => name.startsWith('calibrated'))
        ? await calibrate(opened, prompt, { tokens: CALIBRATION_TOKENS })
        : undefined;
      for (const name of names)
        contenders.push(await Ours.create(opened, name, moments, longest, activations));
      for (const type of types) {
        const made = await Peer.create({ model: path, type, threads, contextSize: longest, chunk });
        contenders.push(made);
        peer = made.about;
      }
      const cells = await measure(contenders, { contexts, rounds, tokens, chunk, prompt }, (part, what) =>
        progress.update(part, what),
      );
      progress.clear();
      const report: Report = {
        benchmark: 'model',
        command: commandLine(out),
        machine: describeMachine(),
        isa:
          device === 'cpu'
            ? backend.info.isa
            : `${backend.info.cuda.devices[0]!.name}, prefill by ${opened.products}`,
        model: opened.identity.name,
        bytesPerToken: opened.bytesPerToken,
        threads,
        activations,
        chunk,
        rounds,
        tokens,
        peer,
        contexts: cells,
      };
      const [json, markdown] = [`${JSON.stringify(report, null, 2)}\n`, renderReport(report)];
      if (out !== undefined) {
        writeFileSync(`${out}.json`, json);
        writeFileSync(`${out}.md`, markdown);
      }
      process.stdout.write(values.json ? json : markdown);
    } finally {
      progress.clear();
      for (const contender of contenders) await contender.close();
    }
    return EXIT.ok;
  },
};

/** As typed, without where the files went: nobody else has that place. */
function commandLine(out: string | undefined): string {
  const kept = process.argv
    .slice(2)
    .filter((one) => one !== '--out' && one !== out && one !== `--out=${out ?? ''}`);
  return ['npm run bench --', ...kept].join(' ');
}

function defaultModel(): string {
  const root = process.env.INNERKV_DATA ?? join(__dirname, '..', '..', 'shared', 'data');
  const path = resolve(root, SMOLLM2);
  if (!existsSync(path)) throw new UsageError(`--model is missing, and there is no ${path}`);
  return path;
}
