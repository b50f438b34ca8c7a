/** `innerkv inspect`: what a model file holds, without reading its weights. */
import { KvError } from '../errors';
import { openModel, type ModelFile, type TensorInfo } from '../model';
import { EXIT, text, type Command, type Values } from './command';
import { bytes, pairs, table } from './terminal';
import { versions } from './version';

interface Stored {
  readonly type: string;
  readonly tensors: number;
  readonly parameters: number;
  readonly bytes: number;
}

type Vocabulary =
  | {
      readonly kind: string;
      readonly tokens: number;
      readonly bos: number | undefined;
      readonly addsBos: boolean;
    }
  | { readonly problem: { readonly code: string; readonly message: string } };

function count({ shape }: TensorInfo): number {
  return shape.reduce((product, extent) => product * extent, 1);
}

/** Numbers and bytes by stored type, the largest first. */
function byType(tensors: readonly TensorInfo[]): Stored[] {
  const rows = new Map<string, Stored>();
  for (const tensor of tensors) {
    const row = rows.get(tensor.type) ?? { type: tensor.type, tensors: 0, parameters: 0, bytes: 0 };
    rows.set(tensor.type, {
      type: row.type,
      tensors: row.tensors + 1,
      parameters: row.parameters + count(tensor),
      bytes: row.bytes + tensor.bytes,
    });
  }
  return [...rows.values()].sort((a, b) => b.bytes - a.bytes);
}

/** A model without a tokenizer is worth looking at too. */
function vocabularyOf(model: ModelFile): Vocabulary {
  try {
    const { kind, size, bos, addsBos } = model.tokenizer;
    return { kind, tokens: size, bos, addsBos };
  } catch (error) {
    if (!(error instanceof KvError)) throw error;
    return { problem: { code: error.code, message: error.message } };
  }
}

function describe(model: ModelFile) {
  const stored = byType([...model.tensors.values()]);
  const sum = (key: 'parameters' | 'bytes') => stored.reduce((total, row) => total + row[key], 0);
  const tokenizer = vocabularyOf(model);
  const { rope } = model.config;
  return {
    versions: versions(),
    ...{ name: model.name, format: model.format, path: model.path, fingerprint: model.fingerprint },
    config: { ...model.config, rope: { ...rope, ...(rope.theta && { theta: [...rope.theta] }) } },
    parameters: sum('parameters'),
    bytes: sum('bytes'),
    stored,
    tokenizer,
    chatTemplate: !('problem' in tokenizer) && model.chat !== undefined,
  };
}

type Description = ReturnType<typeof describe>;

export const inspect: Command = {
  name: 'inspect',
  summary: 'configuration, weights and tokenizer of a model file',
  operand: 'MODEL',
  options: {
    tokenizer: { value: 'FILE', help: 'tokenizer to use instead of the one that the model brings' },
  },
  notes:
    'MODEL is a .gguf, a Hugging Face folder (config.json and safetensors) or a llama2.c .bin. Weights are not read.',
  run(values: Values) {
    const tokenizer = text(values, 'tokenizer');
    const model = openModel(text(values, 'MODEL')!, tokenizer === undefined ? {} : { tokenizer });
    const description = describe(model);
    if (values.json) console.log(JSON.stringify(description, null, 2));
    else print(description);
    return EXIT.ok;
  },
};

function print({ config, tokenizer, ...rest }: Description): void {
  const { rope } = config;
  const scaling = rope.theta ? 'own frequencies' : (rope.scaling?.type ?? 'none');
  const features = [
    config.tiedHead && 'tied head',
    config.attentionBias && 'attention biases',
    config.qkNorm && 'norms of queries and keys',
    config.slidingWindow !== undefined && `sliding window of ${config.slidingWindow} tokens`,
  ].filter((feature) => feature !== false);
  console.log(
    pairs([
      ['name', rest.name],
      ['format', rest.format],
      ['architecture', config.architecture],
      ['parameters', `${rest.parameters} in ${bytes(rest.bytes)}`],
      ['layers', String(config.layers)],
      ['hidden', `${config.hidden}, feed-forward ${config.intermediate}`],
      ['heads', `${config.queryHeads} query, ${config.kvHeads} key-value, of ${config.headDim} channels`],
      ['context', `${config.contextLength} tokens`],
      ['RoPE', `base ${rope.base}, ${rope.layout} pairs, scaling: ${scaling}`],
      ['features', features.join(', ') || 'none'],
      ['vocabulary', `${config.vocabulary}; BOS ${config.bos ?? 'none'}; ends with ${config.eos.join(', ') || 'none'}`],
      ['tokenizer', 'problem' in tokenizer ? tokenizer.problem.message : `${tokenizer.kind}, ${tokenizer.tokens} tokens`],
      ['chat template', rest.chatTemplate ? 'yes' : 'no'],
      ['fingerprint', rest.fingerprint],
    ]),
  ); // prettier-ignore
  const titles = ['stored as', 'tensors', 'parameters', 'bytes', 'bits per parameter'];
  console.log(
    `\n${table(
      titles.map((title, i) => ({ title, text: i === 0 })),
      rest.stored.map((row) => [
        row.type,
        String(row.tensors),
        String(row.parameters),
        bytes(row.bytes),
        ((8 * row.bytes) / row.parameters).toFixed(2),
      ]),
    )}`,
  );
}
