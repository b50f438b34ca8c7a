/** `innerkv generate`: text of a model whose keys and values live in few bits. */
import { readFileSync } from 'node:fs';
import { basename } from 'node:path';
import { createBackend } from '../backend';
import {
  Model,
  openModel,
  type BatchSummary,
  type ChatMessage,
  type GenerateOptions,
  type ModelFile,
  type Prompt,
} from '../model';
import { builtinSchemes, schemeNamed, type DescribedScheme } from '../schemes';
import { count, EXIT, number, required, text, texts, UsageError, type Command, type Values } from './command';
import { DEVICE_OPTIONS, deviceOptions } from './device';
import { interruptible } from './interrupt';
import { bytes, dim, Progress } from './terminal';
import { versions } from './version';

const WHOLE = Number.MAX_SAFE_INTEGER;

export const generate: Command = {
  name: 'generate',
  summary: 'text of a model, through a cache of any scheme',
  options: {
    model: { value: 'M', help: 'a .gguf, a folder with safetensors, or a llama2.c .bin' },
    prompt: { value: 'TEXT', many: true, help: 'several are generated together; - is read from stdin' },
    chat: { help: 'the prompt is a message to a chat model' },
    system: { value: 'TEXT', help: 'system message of the chat' },
    scheme: { value: 'NAME', help: 'how keys and values are stored', default: '4bit' },
    calibration: { value: 'FILE', help: 'moments of this model, for calibrated-kXvY' },
    windows: { value: 'A+B', help: 'first and newest tokens kept in 16 bits', default: '32+96' },
    memory: { value: 'SIZE', help: 'budget of the cache, such as 512MiB (default: what is needed)' },
    'max-tokens': { value: 'N', help: 'at most so many tokens', default: '256' },
    stop: { value: 'TEXT', many: true, help: 'ends the text; may be given several times' },
    temperature: { value: 'T', help: '0: the likeliest token always', default: '0' },
    'top-k': { value: 'K', help: 'draw from the K likeliest tokens' },
    'top-p': { value: 'P', help: 'draw from the likeliest tokens that reach this probability' },
    'min-p': { value: 'P', help: "draw from tokens of at least P times the likeliest one's probability" },
    'repeat-penalty': { value: 'R', help: 'divides the logits of the last 64 tokens' },
    seed: { value: 'N', help: 'of the draws (default: a random one, which --json prints)' },
    activations: { value: 'TYPE', help: 'int8, which is faster, or float32', default: 'int8' },
    ...DEVICE_OPTIONS,
    stream: { help: 'print text as it comes (default on a terminal)' },
  },
  notes: `Schemes: ${builtinSchemes.map(({ name }) => name).join(', ')};\nalso any rotated-kXvY and calibrated-kXvY; 2bit, 3bit and 4bit are calibrated with --calibration, else rotated.`,
  async run(values: Values) {
    const path = required(values, 'model');
    const device = deviceOptions(values);
    const scheme = schemeOf(required(values, 'scheme'), text(values, 'calibration'));
    const request = { ...requestOf(values), scheme };
    const file = openModel(path);
    const prompts = promptsOf(values);
    await using backend = await createBackend(device);
    using model = await Model.open(backend, file);
    using interrupt = interruptible();
    const progress = new Progress();
    const stream = !values.json && prompts.length === 1 && (values.stream === true || process.stdout.isTTY);
    const generation = model.generateBatch(prompts, {
      ...request,
      signal: interrupt.signal,
      onPrefill: (done, total) => progress.update(done / total, `${done} of ${total} tokens of the prompt`),
    });
    try {
      for await (const token of generation) {
        progress.clear();
        if (stream) process.stdout.write(shown(token.text));
      }
    } catch (error) {
      progress.clear();
      if (stream) console.log();
      throw error;
    }
    const summary = await generation.finish();
    if (values.json)
      console.log(JSON.stringify(reportOf(values, scheme.name, file, backend.info, summary), null, 2));
    else {
      if (stream) console.log();
      else print(summary);
      console.error(dim(costOf(summary)));
    }
    return EXIT.ok;
  },
};

function requestOf(values: Values): GenerateOptions {
  const [, sink, recent] = /^(\d{1,5})\+(\d{1,5})$/.exec(required(values, 'windows')) ?? [];
  if (sink === undefined)
    throw new UsageError(`--windows must be like 32+96, not "${String(values.windows)}"`);
  const memory = text(values, 'memory');
  const activations = (['int8', 'float32'] as const).find((type) => type === values.activations);
  if (!activations) throw new UsageError('--activations must be int8 or float32');
  const settings = {
    temperature: number(values, 'temperature', 0, 1000),
    topK: number(values, 'top-k', 0, WHOLE),
    topP: number(values, 'top-p', 0, 1),
    minP: number(values, 'min-p', 0, 1),
    repeatPenalty: number(values, 'repeat-penalty', 0.01, 1000),
    seed: number(values, 'seed', 0, WHOLE),
  };
  return {
    ...Object.fromEntries(Object.entries(settings).filter(([, value]) => value !== undefined)),
    windows: { sink: Number(sink), recent: Number(recent) },
    maxTokens: count(values, 'max-tokens'),
    stop: texts(values, 'stop'),
    activations,
    ...(memory !== undefined && { memory }),
  };
}

/** Names are the user's mistake; what is wrong with a file of moments is told by its own error. */
function schemeOf(name: string, calibration: string | undefined): DescribedScheme {
  if (name.startsWith('calibrated-') && calibration === undefined)
    throw new UsageError(`--scheme ${name} needs --calibration FILE`);
  try {
    return schemeNamed(name, calibration);
  } catch (error) {
    if (calibration !== undefined || !(error instanceof Error)) throw error;
    throw new UsageError(error.message.replace(/\.$/, ''), { cause: error });
  }
}

function promptsOf(values: Values): Prompt[] {
  const given = texts(values, 'prompt');
  if (given.length === 0) throw new UsageError('--prompt is missing');
  if (given.filter((prompt) => prompt === '-').length > 1)
    throw new UsageError('--prompt - can be given once');
  const system = text(values, 'system');
  if (system !== undefined && !values.chat) throw new UsageError('--system needs --chat');
  const before: ChatMessage[] = system === undefined ? [] : [{ role: 'system', content: system }];
  return given
    .map((prompt) => (prompt === '-' ? readFileSync(0, 'utf8') : prompt))
    .map((content) => (values.chat ? [...before, { role: 'user', content }] : content));
}

/** Models may write anything; a terminal would obey its control characters. */
function shown(text: string): string {
  return process.stdout.isTTY ? text.replace(/[^\P{Cc}\n\t]/gu, '\ufffd') : text;
}

function rate({ tokens, seconds }: BatchSummary['prefill']): number {
  return seconds === 0 ? 0 : tokens / seconds;
}

function print({ texts: all }: BatchSummary): void {
  all.forEach(({ text: one }, i) => {
    if (all.length > 1) console.log(`${i === 0 ? '' : '\n'}=== ${i + 1}`);
    console.log(shown(one));
  });
}

function costOf(summary: BatchSummary): string {
  const { prefill, decode, cacheBytes, bitsPerValue, bitsPerValueInAll } = summary;
  const part = (name: string, done: BatchSummary['prefill']) =>
    `${name} ${done.tokens} tokens${done.tokens === 0 ? '' : ` at ${rate(done).toFixed(1)}/s`}`;
  return (
    `${part('prompt', prefill)}; ${part('decoded', decode)}; cache ${bytes(cacheBytes)}, ` +
    `${bitsPerValue.toFixed(2)} bits per value, ${bitsPerValueInAll!.toFixed(2)} in all`
  );
}

function reportOf(
  values: Values,
  scheme: string,
  file: ModelFile,
  { kind, isa, threads }: { kind: string; isa: string; threads: number },
  { texts: all, prefill, decode, ...cost }: BatchSummary,
) {
  return {
    versions: versions(),
    backend: { kind, isa, threads },
    model: { name: file.name, file: basename(file.path), fingerprint: file.fingerprint },
    scheme,
    windows: values.windows,
    // One prompt, one text; several are a list.
    ...(all.length === 1 ? all[0] : { texts: all }),
    ...cost,
    prefill: { ...prefill, tokensPerSecond: rate(prefill) },
    decode: { ...decode, tokensPerSecond: rate(decode) },
  };
}
