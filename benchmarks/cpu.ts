/** `npm run bench -- cpu`: decode attention and append of every scheme on this machine's processor. */
import { writeFileSync } from 'node:fs';
import { availableParallelism, freemem } from 'node:os';
import { builtinSchemes, schemeNamed } from '../lib';
import { EXIT, UsageError, count, list, text, type Command, type Values } from '../lib/cli/command';
import { Progress, bytes } from '../lib/cli/terminal';
import { copyBandwidth, describeMachine } from './cpu/machine';
import { chooseClock, denseBytes, measureCell, measureOverhead, WINDOWS, type Cell } from './cpu/measure';
import { renderReport, type Report } from './cpu/report';
import { makeWorkload, type Workload } from './cpu/workload';

const SHAPE = { queryHeads: 32, kvHeads: 8, headDim: 128 };
const SCHEMES = builtinSchemes.map(({ name }) => name).filter((name) => !name.endsWith('-released'));

export const cpu: Command = {
  name: 'cpu',
  summary: 'decode attention and append of every scheme on this processor',
  options: {
    schemes: { value: 'NAME,…', help: 'schemes to time (default: all that ship)' },
    threads: { value: 'N,…', help: 'threads (default: 1 and all the process may use)' },
    tokens: { value: 'N,…', help: 'tokens of a sequence', default: '32K' },
    batch: { value: 'N,…', help: 'sequences of one call', default: '1' },
    isa: { value: 'NAME,…', help: 'instruction sets (default: the best this machine runs)' },
    repeats: { value: 'N', help: 'rounds; medians are taken over them', default: '25' },
    clock: {
      value: 'NAME',
      help: 'wall, or processor (one thread only) for a busy machine',
      default: 'wall',
    },
    out: { value: 'FILE', help: 'also write FILE.json and FILE.md' },
  },
  notes:
    'One decode step of one layer: 32 query heads over 8 KV heads of 128 channels, windows of 32 + 96 tokens, through\n' +
    'the public API. Dense float32 and binary16 attention, as vectorised and as threaded, run in turn with the schemes.',
  async run(values: Values) {
    const names = list(values, 'schemes') ?? SCHEMES;
    const threads = numbers(values, 'threads') ?? [...new Set([1, availableParallelism()])];
    const isas = list(values, 'isa') ?? [''];
    const out = text(values, 'out');
    const clock = text(values, 'clock');
    if (clock !== 'wall' && clock !== 'processor')
      throw new UsageError(`--clock must be wall or processor, not "${clock ?? ''}"`);
    if (clock === 'processor' && threads.some((one) => one > 1))
      throw new UsageError('--clock processor needs --threads 1');
    chooseClock(clock);
    const repeats = count(values, 'repeats');
    const workload = makeWorkload(SHAPE);
    for (const name of names) checkScheme(name, workload);
    const settings = isas.flatMap((isa) =>
      numbers(values, 'tokens')!.flatMap((tokens) =>
        numbers(values, 'batch')!.flatMap((batch) =>
          threads.map((one) => ({ isa, tokens, batch, threads: one })),
        ),
      ),
    );
    const needed = Math.max(...settings.map((setting) => denseBytes(workload, setting))) * 2.5;
    if (needed > freemem())
      throw new UsageError(
        `this would take about ${bytes(needed)} of memory, ${bytes(freemem())} are free: lower --tokens or --batch`,
      );

    const progress = new Progress();
    const cells: Cell[] = [];
    const copy: { threads: number; gigabytesPerSecond: number }[] = [];
    const overhead: Report['overhead'][number][] = [];
    for (const one of threads) {
      progress.update(0, 'copy bandwidth and call overhead');
      copy.push({ threads: one, gigabytesPerSecond: await copyBandwidth(one) });
      overhead.push(await measureOverhead(workload, one));
    }
    for (const setting of settings)
      cells.push(
        await measureCell(workload, setting, names, repeats, (part, what) =>
          progress.update((cells.length + part) / settings.length, what),
        ),
      );
    progress.clear();

    const report: Report = {
      benchmark: 'cpu',
      clock,
      command: ['npm run bench --', ...process.argv.slice(2)].join(' '),
      machine: describeMachine(),
      shape: SHAPE,
      windows: WINDOWS,
      copy,
      overhead,
      cells,
    };
    const [json, markdown] = [`${JSON.stringify(report, null, 2)}\n`, renderReport(report)];
    if (out !== undefined) {
      writeFileSync(`${out}.json`, json);
      writeFileSync(`${out}.md`, markdown);
    }
    process.stdout.write(values.json ? json : markdown);
    return EXIT.ok;
  },
};

/** Whole numbers between commas, each as count() reads it. */
function numbers(values: Values, name: string): number[] | undefined {
  return list(values, name)?.map((one) => count({ [name]: one }, name));
}

function checkScheme(name: string, { moments }: Workload): void {
  try {
    schemeNamed(name, moments);
  } catch (error) {
    throw new UsageError(error instanceof Error ? error.message.replace(/\.$/, '') : String(error), {
      cause: error,
    });
  }
}
