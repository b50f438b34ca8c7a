/** `innerkv perplexity`: loss and divergence of a model on a text, over caches of several schemes. */
import { writeFileSync } from 'node:fs';
import { basename } from 'node:path';
import { createBackend } from '../backend';
import { calibratedFromPrompt } from '../eval/calibrate';
import {
  perplexity as measure,
  type Contender,
  type PerplexityReport,
  type SchemePerplexity,
} from '../eval/perplexity';
import { planOf, protocols, tokensFor, type Protocol, type ProtocolPlan } from '../eval/protocols';
import { leadingTokens, readText } from '../eval/text';
import { Model, openModel } from '../model';
import {
  builtinSchemes,
  readMoments,
  schemeNamed,
  type BitsOptions,
  type DescribedScheme,
  type Moments,
} from '../schemes';
import { EXIT, UsageError, count, list, required, text, texts, type Command, type Values } from './command';
import { interruptible } from './interrupt';
import { Progress, bytes, dim, table } from './terminal';
import { versions } from './version';

export const perplexity: Command = {
  name: 'perplexity',
  summary: 'what schemes cost a model on a text, against a 16-bit cache',
  options: {
    model: { value: 'M', help: 'a .gguf, a folder with safetensors, or a llama2.c .bin' },
    text: { value: 'F', help: 'text in UTF-8' },
    protocol: { value: 'P', help: 'P1, P2, P3 or P4, see below', default: 'P3' },
    scheme: { value: 'NAME', many: true, help: 'a scheme to measure; may be given several times' },
    calibration: { value: 'FILE', help: 'moments by innerkv calibrate, for calibrated-kXvY' },
    windows: { value: 'A+B', help: 'first and newest tokens kept in 16 bits', default: '32+96' },
    layers: { value: 'L=NAME,…', help: 'layers stored otherwise: 0=q8,28-29=fp16' },
    tokens: { value: 'N', help: 'tokens of a window (default: the protocol’s)' },
    chunks: { value: 'N', help: 'windows to score (default: all)' },
    chunk: { value: 'N', help: 'tokens that go through the model together' },
    threads: { value: 'N', help: 'threads (default: all cores)' },
    out: { value: 'FILE', help: 'also write the JSON there, after every window' },
  },
  notes: [
    'P1  windows of 2,048 side by side, all but the first token scored, prefilled in chunks (as papers do)',
    'P2  windows of 512 with BOS first, second halves scored, prefilled in chunks (as llama.cpp)',
    'P3  windows of 2,048, second halves scored, every token decoded through the cache',
    'P4  windows of 8,192 that overlap by half, second halves scored, every token decoded through the cache',
    '',
    `Schemes: ${builtinSchemes.map(({ name }) => name).join(', ')};`,
    'also any rotated-kXvY, calibrated-kXvY, and prompt-kXvY: calibrated on the first 512 tokens of each window.',
    'NAME@0+0: with 16-bit windows of its own.',
  ].join('\n'),
  async run(values: Values) {
    const started = performance.now();
    const [path, source] = [required(values, 'model'), required(values, 'text')];
    const optional = (name: string) => (values[name] === undefined ? undefined : count(values, name));
    const [threads, chunks, chunk, window] = ['threads', 'chunks', 'chunk', 'tokens'].map(optional);
    const windows = windowsNamed(required(values, 'windows'));
    const protocol = protocols.find((one) => one === values.protocol);
    if (!protocol) throw new UsageError(`--protocol must be one of ${protocols.join(', ')}`);
    const calibration = text(values, 'calibration');
    const names = texts(values, 'scheme').flatMap((one) => list({ scheme: one }, 'scheme') ?? []);
    if (names.length === 0) throw new UsageError('--scheme is missing');
    const content = readText(source);
    const moments = calibration === undefined ? undefined : readMoments(calibration);
    const layers = layersNamed(list(values, 'layers') ?? [], moments);
    const file = openModel(path);
    await using backend = await createBackend({ backend: 'cpu', ...(threads && { threads }) });
    using model = await Model.open(backend, file, { activations: 'float32' });
    const contenders = [...new Set(names)].map((name) => contenderNamed(name, moments, model));

    const progress = new Progress();
    using interrupt = interruptible();
    progress.update(0, 'text to tokens');
    const { tokenizer } = file;
    const bos = tokenizer.addsBos ? tokenizer.bos : undefined;
    const plan = planOf(protocol, { bos, ...(window && { window }) });
    const ids = leadingTokens(tokenizer, content, tokensFor(plan, chunks ?? Infinity), {
      bos: plan.bos === 'text',
    });
    const begun = performance.now();
    const out = text(values, 'out');
    const { kind, isa, threads: used } = backend.info;
    const report = (result: PerplexityReport) => ({
      versions: versions(),
      backend: { kind, isa, threads: used },
      model: { name: file.name, file: basename(path), fingerprint: file.fingerprint },
      text: basename(source),
      protocol: plan,
      activations: 'float32',
      cacheWindows: windows,
      layers: Object.fromEntries([...layers].map(([layer, { name }]) => [layer, name])),
      ...(calibration !== undefined && {
        calibration: {
          file: basename(calibration),
          ...(moments?.origin && { tokens: moments.origin.tokens }),
        },
      }),
      ...result,
      seconds: (performance.now() - started) / 1000,
    });
    const write = (result: PerplexityReport) => {
      if (out !== undefined) writeFileSync(out, `${JSON.stringify(report(result), null, 2)}\n`);
    };
    const result = await measure(model, ids, {
      ...{ plan, contenders, bos, windows, layers, signal: interrupt.signal, onWindow: write },
      ...(chunks && { chunks }),
      ...(chunk && { chunk }),
      byteLength: (token) => tokenizer.bytes(token).length,
      onProgress: (fraction, scheme) => progress.update(fraction, `${scheme}, ${left(begun, fraction)} left`),
    });
    progress.clear();
    write(result);
    const whole = report(result);
    if (values.json) console.log(JSON.stringify(whole, null, 2));
    else print(plan, result, whole.seconds);
    return EXIT.ok;
  },
};

function windowsNamed(given: string): { sink: number; recent: number } {
  const [, sink, recent] = /^(\d{1,5})\+(\d{1,5})$/.exec(given) ?? [];
  if (sink === undefined) throw new UsageError(`--windows must be like 32+96, not "${given}"`);
  return { sink: Number(sink), recent: Number(recent) };
}

function named(name: string, moments: Moments | undefined): DescribedScheme {
  try {
    return schemeNamed(name, moments);
  } catch (error) {
    const reason = error instanceof Error ? error.message.replace(/\.$/, '') : String(error);
    throw new UsageError(
      reason.includes('needs calibration moments') ? `${reason}: --calibration FILE` : reason,
      { cause: error },
    );
  }
}

/** NAME or NAME@A+B, with 16-bit windows of its own. */
function contenderNamed(given: string, moments: Moments | undefined, model: Model): Contender {
  const [name = '', own] = given.split('@');
  const windows = own === undefined ? {} : { windows: windowsNamed(own) };
  const [, keyBits, valueBits] = /^prompt-k(\d+)v(\d+)$/.exec(name) ?? [];
  if (keyBits === undefined) return { name: given, scheme: named(name, moments), ...windows };
  const bits = { keyBits: Number(keyBits), valueBits: Number(valueBits) } as BitsOptions;
  return {
    name: given,
    scheme: (tokens, options) => calibratedFromPrompt(model, tokens, { ...bits, ...options }),
    ...windows,
  };
}

function layersNamed(
  entries: readonly string[],
  moments: Moments | undefined,
): ReadonlyMap<number, DescribedScheme> {
  const layers = new Map<number, DescribedScheme>();
  for (const entry of entries) {
    const [, first, last, name] = /^(\d{1,4})(?:-(\d{1,4}))?=(.+)$/.exec(entry) ?? [];
    if (first === undefined || name === undefined)
      throw new UsageError(`--layers must be like 0=q8,28-29=fp16, not "${entry}"`);
    const scheme = named(name, moments);
    for (let layer = Number(first); layer <= Number(last ?? first); layer++) layers.set(layer, scheme);
  }
  return layers;
}

/** Time that is left if the rest goes as what is done. */
function left(begun: number, fraction: number): string {
  if (fraction < 0.01) return 'some time';
  const seconds = (((performance.now() - begun) / 1000) * (1 - fraction)) / fraction;
  return seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`;
}

/** Fields that every figure needs beside it. */
function setting({ protocol, window, stride, bos }: ProtocolPlan, report: PerplexityReport): string {
  const head: Record<Protocol, string> = {
    P1: 'prefilled',
    P2: 'prefilled',
    P3: 'decoded',
    P4: 'decoded',
  };
  return (
    `${protocol} (${head[protocol]} in chunks of ${report.chunk}): window ${window}, stride ${stride}, BOS: ${bos}, ` +
    `${report.windows} windows, ${report.tokensScored} tokens scored`
  );
}

function print(plan: ProtocolPlan, report: PerplexityReport, seconds: number): void {
  console.log(`${setting(plan, report)}\n`);
  const titles = [
    ...['scheme', 'bits', 'in all', 'ppl', 'change', 'bits/byte'],
    ...['KLD', '99 % KLD', 'top-1', 'rms Δp', 'cache', 'tokens/s'],
  ];
  const percent = (share: number) => `${(100 * share).toFixed(2)} %`;
  const signed = (value: number) => `${value < 0 ? '−' : '+'}${Math.abs(value).toFixed(3)}`;
  const rows = report.schemes.map((row: SchemePerplexity) => [
    row.scheme,
    row.bitsPerValue.toFixed(2),
    row.bitsPerValueInAll.toFixed(2),
    row.perplexity.toFixed(3),
    signed(row.perplexityChange),
    row.bitsPerByte?.toFixed(4) ?? '',
    row.meanKld.toFixed(4),
    row.kld99.toFixed(3),
    percent(row.topAgreement),
    percent(row.rmsShift),
    bytes(row.cacheBytes),
    row.tokensPerSecond.toFixed(1),
  ]);
  console.log(
    table(
      titles.map((title) => ({ title, text: title === 'scheme' })),
      rows,
    ),
  );
  if (plan.protocol === 'P4') {
    console.log('\nnats per token by position in the window');
    const [first] = report.schemes;
    console.log(
      table(
        [
          { title: 'scheme', text: true },
          ...first!.buckets.map(({ from, to }) => ({ title: `${from}…${to - 1}` })),
        ],
        report.schemes.map((row) => [row.scheme, ...row.buckets.map(({ nll }) => nll.toFixed(4))]),
      ),
    );
  }
  console.log(
    dim(
      '\nbits: codes and scales per number; in all: everything held at the end of a window. KLD in nats, top-1: same most probable\n' +
        `token, rms Δp: change of the right token's probability, all against the 16-bit cache. ${seconds.toFixed(0)} s`,
    ),
  );
}
