/** What perplexity and sweep share: options, one run over a model and a text, and its report. */
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { basename } from 'node:path';
import { createBackend } from '../backend';
import { perplexity, type PerplexityReport } from '../eval/perplexity';
import { planOf, protocols, tokensFor, type Protocol, type ProtocolPlan } from '../eval/protocols';
import { type WindowRecord } from '../eval/records';
import { leadingTokens, readText } from '../eval/text';
import { Model, openModel } from '../model';
import { readMoments } from '../schemes';
import { UsageError, count, list, required, texts, type Option, type Values } from './command';
import { contenderNamed, layersNamed, schemeNames, windowsNamed } from './contenders';
import { DEVICE_OPTIONS, deviceOptions } from './device';
import { interruptible } from './interrupt';
import { Progress } from './terminal';
import { versions } from './version';

export const measurementOptions: Readonly<Record<string, Option>> = {
  model: { value: 'M', help: 'a .gguf, a folder with safetensors, or a llama2.c .bin' },
  text: { value: 'F', help: 'text in UTF-8' },
  protocol: { value: 'P', help: 'P1, P2, P3 or P4, see below', default: 'P3' },
  scheme: { value: 'NAME', many: true, help: 'schemes to measure, see below; may be given several times' },
  calibration: {
    value: '[NAME=]FILE',
    many: true,
    help: 'moments by innerkv calibrate, for calibrated-kXvY; may be given several times',
  },
  windows: { value: 'A+B', help: 'first and newest tokens kept in 16 bits', default: '32+96' },
  layers: { value: 'L=NAME,…', help: 'layers stored otherwise by all: 0=q8,28-29=fp16' },
  tokens: { value: 'N', help: 'tokens of a window (default: the protocol’s)' },
  chunks: { value: 'N', help: 'windows to score (default: all)' },
  chunk: { value: 'N', help: 'tokens that go through the model together' },
  ...DEVICE_OPTIONS,
};

export const protocolNotes = [
  'P1  windows of 2,048 side by side, all but the first token scored, prefilled in chunks (as papers do)',
  'P2  windows of 512 with BOS first, second halves scored, prefilled in chunks (as llama.cpp)',
  'P3  windows of 2,048, second halves scored, every token decoded through the cache',
  'P4  windows of 8,192 that overlap by half, second halves scored, every token decoded through the cache',
].join('\n');

function sha256(data: string | Uint8Array): string {
  return createHash('sha256').update(data).digest('hex');
}

/** "c4=FILE" and "FILE", which is named after itself. */
function calibrationFiles(given: readonly string[]): ReadonlyMap<string, string> {
  const files = new Map<string, string>();
  for (const one of given) {
    const [, name = basename(one), file = one] = /^([\w-]+)=(.+)$/.exec(one) ?? [];
    if (files.has(name)) throw new UsageError(`--calibration ${name} is given twice`);
    files.set(name, file);
  }
  return files;
}

/** What figures depend on besides the scheme: two runs that agree in it may be put together. */
export interface MeasurementSetting {
  readonly model: { readonly name: string; readonly file: string; readonly fingerprint: string };
  readonly text: { readonly file: string; readonly sha256: string };
  readonly protocol: ProtocolPlan;
  readonly activations: 'float32';
  readonly cacheWindows: { readonly sink: number; readonly recent: number };
  readonly layers: Readonly<Record<number, string>>;
  readonly calibrations: readonly {
    readonly name: string;
    readonly file: string;
    readonly sha256: string;
    readonly tokens?: number;
  }[];
}

export interface MeasurementReport extends MeasurementSetting, Omit<PerplexityReport, 'records'> {
  readonly versions: ReturnType<typeof versions>;
  readonly backend: { readonly kind: string; readonly isa: string; readonly threads: number };
  readonly processor: string;
  /** Of its end, ISO 8601. */
  readonly date: string;
  readonly seconds: number;
}

export interface MeasurementHooks {
  /** Records of an earlier run in the same setting. */
  readonly known?: (setting: MeasurementSetting) => readonly WindowRecord[];
  /** After each window. */
  readonly onReport?: (report: MeasurementReport, records: readonly WindowRecord[]) => void;
}

/** Runs what a command line asks for. Ctrl-C ends it between two passes of the model. */
export async function runMeasurement(
  values: Values,
  { known, onReport }: MeasurementHooks = {},
): Promise<MeasurementReport> {
  const started = performance.now();
  const [path, source] = [required(values, 'model'), required(values, 'text')];
  const optional = (name: string) => (values[name] === undefined ? undefined : count(values, name));
  const [chunks, chunk, window] = ['chunks', 'chunk', 'tokens'].map(optional);
  const device = deviceOptions(values);
  const windows = windowsNamed(required(values, 'windows'));
  const protocol = protocols.find((one) => one === values.protocol);
  if (!protocol) throw new UsageError(`--protocol must be one of ${protocols.join(', ')}`);
  const files = calibrationFiles(texts(values, 'calibration'));
  const names = schemeNames(texts(values, 'scheme'));
  if (names.length === 0) throw new UsageError('--scheme is missing');
  const content = readText(source);
  const calibrations = new Map([...files].map(([name, file]) => [name, readMoments(file)]));
  const layers = layersNamed(list(values, 'layers') ?? [], calibrations);
  const file = openModel(path);
  await using backend = await createBackend(device);
  using model = await Model.open(backend, file, { activations: 'float32' });
  const contenders = names.map((name) => contenderNamed(name, calibrations, model));

  const progress = new Progress();
  using interrupt = interruptible();
  progress.update(0, 'text to tokens');
  const { tokenizer } = file;
  const bos = tokenizer.addsBos ? tokenizer.bos : undefined;
  const plan = planOf(protocol, { bos, ...(window && { window }) });
  const ids = leadingTokens(tokenizer, content, tokensFor(plan, chunks ?? Infinity), {
    bos: plan.bos === 'text',
  });
  const setting: MeasurementSetting = {
    model: { name: file.name, file: basename(path), fingerprint: file.fingerprint },
    text: { file: basename(source), sha256: sha256(content) },
    protocol: plan,
    activations: 'float32',
    cacheWindows: windows,
    layers: Object.fromEntries([...layers].map(([layer, { name }]) => [layer, name])),
    calibrations: [...files].map(([name, from]) => {
      const tokens = calibrations.get(name)?.origin?.tokens;
      const sum = sha256(readFileSync(from));
      return { name, file: basename(from), sha256: sum, ...(tokens !== undefined && { tokens }) };
    }),
  };
  const { kind, isa, threads: used } = backend.info;
  const reportOf = ({ records: _, ...result }: PerplexityReport): MeasurementReport => ({
    versions: versions(),
    backend: { kind, isa, threads: used },
    processor: cpus()[0]?.model.trim() ?? 'unknown',
    date: new Date().toISOString().slice(0, 10),
    ...setting,
    ...result,
    seconds: (performance.now() - started) / 1000,
  });
  const begun = performance.now();
  const result = await perplexity(model, ids, {
    ...{ plan, contenders, bos, windows, layers, signal: interrupt.signal },
    known: known?.(setting) ?? [],
    onWindow: (part) => onReport?.(reportOf(part), part.records),
    ...(chunks && { chunks }),
    ...(chunk && { chunk }),
    byteLength: (token) => tokenizer.bytes(token).length,
    onProgress: (fraction, scheme) => progress.update(fraction, `${scheme}, ${left(begun, fraction)} left`),
  });
  progress.clear();
  const report = reportOf(result);
  onReport?.(report, result.records);
  return report;
}

/** Time that is left if the rest goes as what is done. */
function left(begun: number, fraction: number): string {
  if (fraction < 0.01) return 'some time';
  const seconds = (((performance.now() - begun) / 1000) * (1 - fraction)) / fraction;
  return seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`;
}

/** Fields that every figure needs beside it. */
export function settingLine({ protocol: plan, ...report }: MeasurementReport): string {
  const head: Record<Protocol, string> = {
    P1: 'prefilled',
    P2: 'prefilled',
    P3: 'decoded',
    P4: 'decoded',
  };
  return (
    `${plan.protocol} (${head[plan.protocol]} in chunks of ${report.chunk}): window ${plan.window}, stride ${plan.stride}, BOS: ` +
    `${plan.bos}, ${report.windows} windows, ${report.tokensScored} tokens scored`
  );
}

export function percent(share: number): string {
  return `${(100 * share).toFixed(2)} %`;
}

export function signed(value: number): string {
  return `${value < 0 ? '−' : '+'}${Math.abs(value).toFixed(3)}`;
}
