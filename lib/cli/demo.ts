/** `innerkv demo`: every scheme on recorded activations of a real model, through the public API. */
import { writeFileSync } from 'node:fs';
import { createBackend } from '../backend';
import { builtinSchemes, schemeNamed } from '../schemes';
import { EXIT, UsageError, list, text, type Command, type Values } from './command';
import { exactAttention } from './demo/exact';
import { measureDense, measureScheme, type DenseResult, type SchemeResult } from './demo/measure';
import { readRecording } from './demo/recording';
import { renderSvg } from './svg';
import { Progress, bytes, dim, table } from './terminal';
import { versions } from './version';

const WINDOWS = { sink: 32, recent: 96 };

export const demo: Command = {
  name: 'demo',
  summary: 'error, size and speed of every scheme on activations of a real model',
  options: {
    schemes: { value: 'NAME,…', help: 'schemes to compare (default: all that ship)' },
    svg: { value: 'FILE', help: 'also write a plot of error against bits' },
  },
  notes: `Schemes: ${builtinSchemes.map(({ name }) => name).join(', ')};\nalso any rotated-kXvY and calibrated-kXvY.`,
  async run(values: Values) {
    const names = list(values, 'schemes') ?? builtinSchemes.map(({ name }) => name);
    const svg = text(values, 'svg');
    const started = performance.now();
    const recording = readRecording();
    const chosen = names.map((name) => named(name, recording.moments));
    const first = recording.tokens / 2;
    await using backend = await createBackend();

    const progress = new Progress();
    const steps = recording.layers.length + 1 + chosen.length;
    let done = 0;
    progress.update(0, 'exact attention');
    const exact = exactAttention(recording, first, () => progress.update(++done / steps, 'exact attention'));
    const run = { backend, recording, exact, first, windows: WINDOWS };
    const dense = measureDense(run);
    done++;
    const results: SchemeResult[] = [];
    for (const scheme of chosen) {
      progress.update(done / steps, scheme.name);
      results.push(
        await measureScheme(run, scheme, (part) => progress.update((done + part) / steps, scheme.name)),
      );
      done++;
    }
    progress.clear();

    if (svg !== undefined) writeFileSync(svg, plot(results));
    const { kind, isa, threads, why } = backend.info;
    const report = {
      versions: versions(),
      backend: { kind, isa, threads, why },
      recording: { ...recording.metadata, ...recording.shape, tokens: recording.tokens },
      windows: WINDOWS,
      queries: { first, count: recording.tokens - first },
      dense,
      schemes: results,
      seconds: (performance.now() - started) / 1000,
    };
    if (values.json) console.log(JSON.stringify(report, null, 2));
    else {
      print(report);
      if (svg !== undefined) console.log(dim(`plot: ${svg}`));
    }
    return EXIT.ok;
  },
};

function named(name: string, moments: Parameters<typeof schemeNamed>[1]) {
  try {
    return schemeNamed(name, moments);
  } catch (error) {
    throw new UsageError(error instanceof Error ? error.message.replace(/\.$/, '') : String(error), {
      cause: error,
    });
  }
}

interface Report {
  readonly backend: { kind: string; isa: string; threads: number; why: string };
  readonly recording: {
    layers: number;
    queryHeads: number;
    kvHeads: number;
    headDim: number;
    tokens: number;
  };
  readonly queries: { first: number; count: number };
  readonly dense: DenseResult;
  readonly schemes: readonly SchemeResult[];
  readonly seconds: number;
}

function print({ backend, recording, queries, dense, schemes, seconds }: Report): void {
  const { layers, queryHeads, headDim, tokens } = recording;
  const last = queries.first + queries.count - 1;
  console.log(
    `SmolLM2-135M, ${layers} layers of ${queryHeads} query heads sharing one KV head, head_dim ${headDim}, ${tokens} tokens of WikiText-2.\n` +
      `${backend.kind} (${backend.isa}, ${backend.threads} threads): ${backend.why}\n` +
      `Each token is appended, then attends; queries ${queries.first}…${last} are compared with exact float64 attention.\n`,
  );
  const titles = [
    'scheme',
    'error',
    'cosine',
    'KL',
    'bits',
    `@${tokens}`,
    '@32K',
    'memory',
    'saving',
    'append µs',
    'attend µs',
  ];
  const timing = (us: number) => us.toFixed(1);
  const rows = schemes.map((row) => [
    row.scheme,
    `${(100 * row.relativeError).toFixed(row.relativeError < 0.001 ? 3 : 2)} %`,
    row.cosine.toFixed(5),
    row.kl.toFixed(5),
    row.bitsPerValue.toFixed(2),
    row.bitsPerValueNow.toFixed(2),
    row.bitsPerValueAt32K.toFixed(2),
    bytes(row.usedBytes),
    `${row.saving.toFixed(2)} x`,
    timing(row.appendMicroseconds),
    timing(row.attendMicroseconds),
  ]);
  const empty = ['', '', '', '16.00', '16.00', '16.00'];
  rows.push(
    ['dense fp16', ...empty, bytes(dense.fp16Bytes), '1.00 x', '', timing(dense.fp16Microseconds)],
    [
      'dense fp32',
      '',
      '',
      '',
      '32.00',
      '32.00',
      '32.00',
      bytes(2 * dense.fp16Bytes),
      '0.50 x',
      '',
      timing(dense.fp32Microseconds),
    ],
  );
  console.log(
    table(
      titles.map((title) => ({ title, text: title === 'scheme' })),
      rows,
    ),
  );
  console.log(
    dim(
      `\nerror: rms of the output's error over rms of the output, mean of the layers; KL: of attention probabilities, nats;\n` +
        `bits per value without 16-bit windows, then everything at ${tokens} and at 32,768 tokens; µs: median per token and layer.\n` +
        `${seconds.toFixed(1)} s`,
    ),
  );
}

function plot(results: readonly SchemeResult[]): string {
  const families = [...new Set(results.map(({ scheme }) => family(scheme)))];
  return renderSvg({
    title: 'Attention output error against bits per value (SmolLM2-135M, 512 queries, windows 32 + 96)',
    xLabel: 'bits per stored value, without 16-bit windows',
    yLabel: 'relative rms error of the attention output',
    series: families.map((name) => ({
      name,
      points: results
        .filter(({ scheme }) => family(scheme) === name)
        .map((row) => ({
          x: row.bitsPerValue,
          y: row.relativeError,
          label: row.scheme.replace(/^\w+-/, ''),
        })),
    })),
  });
}

function family(scheme: string): string {
  return /^(innerq|rotated|calibrated)-/.exec(scheme)?.[1] ?? 'per group of 32';
}
