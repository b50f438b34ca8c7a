/** Hugging Face folders written here: one file and shards, right and wrong. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { KvError } from '../../lib/errors';
import { openModel } from '../../lib/model';
import { failure } from '../support/failures';
import { byteAlphabet } from '../support/gguf';
import { Random } from '../support/random';

const corrupt = (text: string) => failure('ERR_INNERKV_CORRUPT', text);
const unsupported = (text: string) => failure('ERR_INNERKV_UNSUPPORTED', text);
const root = mkdtempSync(join(tmpdir(), 'innerkv-'));
afterAll(() => rmSync(root, { recursive: true }));

interface Stored {
  readonly name: string;
  readonly shape: readonly number[];
  readonly dtype?: string;
}

function safetensors(tensors: readonly Stored[]): Uint8Array {
  let at = 0;
  const entries = tensors.map(({ name, shape, dtype = 'BF16' }) => {
    const bytes = shape.reduce(
      (product, extent) => product * extent,
      dtype === 'F32' || dtype === 'I32' ? 4 : 2,
    );
    return [name, { dtype, shape, data_offsets: [at, (at += bytes)] }];
  });
  const json = new TextEncoder().encode(JSON.stringify(Object.fromEntries(entries)));
  const file = new Uint8Array(8 + json.length + at);
  new DataView(file.buffer).setBigUint64(0, BigInt(json.length), true);
  file.set(json, 8);
  return file;
}

const vocabulary = 260;
const layerTensors = (i: number): Stored[] =>
  Object.entries({
    'input_layernorm.weight': [32],
    'self_attn.q_proj.weight': [32, 32],
    'self_attn.k_proj.weight': [16, 32],
    'self_attn.v_proj.weight': [16, 32],
    'self_attn.o_proj.weight': [32, 32],
    'post_attention_layernorm.weight': [32],
    'mlp.gate_proj.weight': [64, 32],
    'mlp.up_proj.weight': [64, 32],
    'mlp.down_proj.weight': [32, 64],
  }).map(([name, shape]) => ({ name: `model.layers.${i}.${name}`, shape }));
const embedding: Stored = { name: 'model.embed_tokens.weight', shape: [vocabulary, 32] };
const norm: Stored = { name: 'model.norm.weight', shape: [32], dtype: 'F32' };
const head: Stored = { name: 'lm_head.weight', shape: [vocabulary, 32] };
const tensors = [embedding, ...layerTensors(0), ...layerTensors(1), norm];

const config = {
  model_type: 'llama',
  num_hidden_layers: 2,
  hidden_size: 32,
  intermediate_size: 64,
  num_attention_heads: 2,
  num_key_value_heads: 1,
  vocab_size: vocabulary,
  max_position_embeddings: 256,
  rms_norm_eps: 1e-5,
  rope_theta: 500000,
  hidden_act: 'silu',
  tie_word_embeddings: true,
  bos_token_id: 1,
  eos_token_id: 2,
};

let folders = 0;
/** A folder with these files; objects are written as JSON. */
function folder(files: Readonly<Record<string, object | string | Uint8Array>>): string {
  const path = join(root, String(folders++));
  mkdirSync(path);
  for (const [name, content] of Object.entries(files))
    writeFileSync(
      join(path, name),
      typeof content === 'string' || content instanceof Uint8Array ? content : JSON.stringify(content),
    );
  return path;
}
const model = (
  changes: object = {},
  stored: readonly Stored[] = tensors,
  files: Parameters<typeof folder>[0] = {},
) =>
  openModel(
    folder({ 'config.json': { ...config, ...changes }, 'model.safetensors': safetensors(stored), ...files }),
  );

test('one file: configuration and tensors', () => {
  const { config: read, tensors: found, format } = model();
  expect(format).toBe('Hugging Face');
  expect(read).toEqual({
    ...{
      architecture: 'llama',
      layers: 2,
      hidden: 32,
      intermediate: 64,
      queryHeads: 2,
      kvHeads: 1,
      headDim: 16,
    },
    ...{ vocabulary, contextLength: 256, rmsEpsilon: 1e-5, rope: { base: 500000, layout: 'half' } },
    ...{ qkNorm: false, attentionBias: false, tiedHead: true, bos: 1, eos: [2] },
  });
  expect(found.size).toBe(2 + 18);
  expect(found.get('layers.1.down')).toMatchObject({ type: 'BF16', shape: [32, 64], bytes: 4096 });
  expect(found.get('norm')!.type).toBe('F32');
});

test('shards: every tensor from the file that the index names', () => {
  const weights = { a: tensors.slice(0, 7), b: tensors.slice(7) };
  const names = { a: 'model-00001-of-00002.safetensors', b: 'model-00002-of-00002.safetensors' };
  const map = (which: 'a' | 'b') =>
    Object.fromEntries(weights[which].map(({ name }) => [name, names[which]]));
  const index = (weight_map: unknown) => ({ 'model.safetensors.index.json': { metadata: {}, weight_map } });
  const files = {
    'config.json': config,
    [names.a]: safetensors(weights.a),
    [names.b]: safetensors(weights.b),
  };
  const right = { ...map('a'), ...map('b') };
  const opened = openModel(folder({ ...files, ...index(right) }));
  expect(opened.tensors.size).toBe(tensors.length);
  expect(opened.tensors.get('norm')!.path).toContain(names.b);
  // The same weights in one file are the same model.
  expect(opened.fingerprint).toBe(model().fingerprint);

  const wrong: [unknown, Error][] = [
    [undefined, corrupt('weight_map')],
    [[], corrupt('weight_map')],
    [{ ...right, [norm.name]: names.a }, corrupt('is not in the shard')],
    [{ ...right, more: names.a }, corrupt('"more" is not in the shard')],
    [{ ...right, [norm.name]: '../model.safetensors' }, corrupt('no name of a shard')],
    [{ ...right, [norm.name]: '/etc/passwd' }, corrupt('no name of a shard')],
    [{ ...right, [norm.name]: 7 }, corrupt('no name of a shard')],
    [
      { ...right, [norm.name]: 'none.safetensors' },
      failure('ERR_INNERKV_INVALID_ARGUMENT', 'none.safetensors'),
    ],
    [map('a'), corrupt('missing')],
  ];
  for (const [weight_map, error] of wrong)
    expect(() => openModel(folder({ ...files, ...index(weight_map) }))).toThrow(error);
});

test('variants: heads of their own, biases, norms, windows, scaling, several ends', () => {
  expect(model({ tie_word_embeddings: false }, [...tensors, head]).config.tiedHead).toBe(false);
  expect(model({}, [...tensors, head]).tensors.has('head')).toBe(false); // tied, but stored all the same
  const perLayer = (suffix: string, extent: number) =>
    [0, 1].map((i): Stored => ({ name: `model.layers.${i}.self_attn.${suffix}`, shape: [extent] }));
  const biases = [...perLayer('q_proj.bias', 32), ...perLayer('k_proj.bias', 16), ...perLayer('v_proj.bias', 16)];
  expect(model({ model_type: 'qwen2' }, [...tensors, ...biases]).config).toMatchObject({ attentionBias: true });
  const norms = [...perLayer('q_norm.weight', 16), ...perLayer('k_norm.weight', 16)];
  expect(model({ model_type: 'qwen3' }, [...tensors, ...norms]).config).toMatchObject({ qkNorm: true });
  expect(model({ model_type: 'mistral', sliding_window: 64 }).config).toMatchObject({ architecture: 'llama', slidingWindow: 64 });
  expect(model({ model_type: 'mistral', sliding_window: null }).config.slidingWindow).toBeUndefined();
  const qwen = { model_type: 'qwen2', sliding_window: 64 };
  expect(model({ ...qwen, use_sliding_window: false }).config.slidingWindow).toBeUndefined();
  expect(model({ ...qwen, use_sliding_window: true, max_window_layers: 2 }).config.slidingWindow).toBeUndefined();
  expect(model({ ...qwen, use_sliding_window: true, max_window_layers: 0 }).config.slidingWindow).toBe(64);
  expect(model({ rope_scaling: { type: 'linear', factor: 2 } }).config.rope.scaling).toEqual({ type: 'linear', factor: 2 });
  const llama3 = { rope_type: 'llama3', factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 64 };
  const scaling = { type: 'llama3', factor: 8, lowFreqFactor: 1, highFreqFactor: 4, originalContext: 64 };
  expect(model({ rope_scaling: llama3 }).config.rope).toEqual({ base: 500000, layout: 'half', scaling });
  expect(model({ rope_parameters: { ...llama3, rope_theta: 7 } }).config.rope).toEqual({ base: 7, layout: 'half', scaling });
  expect(model({ partial_rotary_factor: 0.5 }).config.rope.rotaryDims).toBe(8);
  expect(model({ rope_scaling: null }).config.rope.scaling).toBeUndefined();
  const generation = { 'generation_config.json': { eos_token_id: [2, 5] } };
  expect(model({ eos_token_id: [7, 2] }, tensors, generation).config.eos).toEqual([7, 2, 5]);
  const inverse = { name: 'model.layers.0.self_attn.rotary_emb.inv_freq', shape: [8] };
  expect(model({}, [...tensors, inverse]).tensors.size).toBe(tensors.length);
}); // prettier-ignore

test.each<[string, object, readonly Stored[], Error]>([
  ['another architecture', { model_type: 'gemma3' }, tensors, unsupported('"gemma3"')],
  ['no architecture', { model_type: undefined }, tensors, unsupported('undefined')],
  ['another activation', { hidden_act: 'gelu' }, tensors, unsupported('"gelu"')],
  ['weights of another kind', { quantization_config: { quant_method: 'awq' } }, tensors, unsupported('quantised')],
  ['yarn', { rope_scaling: { rope_type: 'yarn', factor: 4 } }, tensors, unsupported('"yarn"')],
  ['scaling without a factor', { rope_scaling: { rope_type: 'linear' } }, tensors, corrupt('factor')],
  ['a factor of 0', { rope_scaling: { rope_type: 'linear', factor: 0 } }, tensors, corrupt('factor')],
  ['scaling in words', { rope_scaling: 'linear' }, tensors, corrupt('rope_scaling')],
  ['windows in some layers', { model_type: 'qwen2', sliding_window: 8, use_sliding_window: true, max_window_layers: 1 }, tensors, unsupported('some of its layers')],
  ['kinds of layers', { layer_types: ['full_attention', 'sliding_attention'] }, tensors, unsupported('some of its layers')],
  ['no layers', { num_hidden_layers: undefined }, tensors, corrupt('lacks num_hidden_layers')],
  ['layers in words', { num_hidden_layers: '2' }, tensors, corrupt('no number')],
  ['2.5 layers', { num_hidden_layers: 2.5 }, tensors, corrupt('layers must be')],
  ['-1 layers', { num_hidden_layers: -1 }, tensors, corrupt('layers must be')],
  ['a head that is not there', { tie_word_embeddings: false }, tensors, corrupt('head is missing')],
  ['another width', { intermediate_size: 128 }, tensors, corrupt('layers.0.gate has shape')],
  ['an end outside the vocabulary', { eos_token_id: vocabulary }, tensors, corrupt('special token 260')],
  ['an end in words', { eos_token_id: ['</s>'] }, tensors, corrupt('eos_token_id')],
  ['whole numbers for weights', {}, [{ ...embedding, dtype: 'I32' }, ...tensors.slice(1)], unsupported('I32')],
  ['an empty tensor', {}, [...tensors, { name: 'model.layers.2.mlp.up_proj.weight', shape: [0, 32] }], corrupt('is empty')],
  ['an unknown tensor', {}, [...tensors, { name: 'model.layers.0.mlp.experts.0.w1', shape: [1] }], unsupported('experts')],
])('refused: %s', (_, changes, stored, error) => expect(() => model(changes, stored)).toThrow(error)); // prettier-ignore

test('files that are missing or no JSON', () => {
  expect(() => openModel(folder({}))).toThrow(corrupt('no config.json'));
  expect(() => openModel(folder({ 'config.json': config }))).toThrow(failure('ERR_INNERKV_INVALID_ARGUMENT', 'model.safetensors'));
  for (const text of ['', '{', '[]', 'null', '7'])
    expect(() => openModel(folder({ 'config.json': text }))).toThrow(corrupt('config.json'));
  expect(() => openModel(folder({ 'config.json': Uint8Array.of(0x22, 0xff, 0x22) }))).toThrow(corrupt('UTF-8'));
  const path = folder({});
  mkdirSync(join(path, 'config.json'));
  expect(() => openModel(path)).toThrow(failure('ERR_INNERKV_INVALID_ARGUMENT', 'not a file'));
}); // prettier-ignore

test('tokenizer and chat template of the folder, in their several places', () => {
  const vocab = Object.fromEntries(byteAlphabet.map((token, i) => [token, 3 + i]));
  const tokenizer = {
    added_tokens: ['<unk>', '<s>', '</s>'].map((content, id) => ({ id, content, special: true })),
    pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, use_regex: true },
    decoder: { type: 'ByteLevel' },
    model: { type: 'BPE', vocab, merges: [] },
  };
  const template = '{{ bos_token }}[{{ messages[0].content }}]{{ eos_token }}';
  const say = [{ role: 'user', content: 'hi' }];
  const opened = model({}, tensors, {
    'tokenizer.json': tokenizer,
    'tokenizer_config.json': { bos_token: '<s>', add_bos_token: true, chat_template: template },
  });
  expect(opened.tokenizer.decode(opened.tokenizer.encode('h\u00e9llo'))).toBe('h\u00e9llo');
  expect(opened.tokenizer.addsBos).toBe(true);
  expect(opened.chat!.render(say)).toBe('<s>[hi]</s>');
  const files = { 'tokenizer.json': tokenizer };
  const list = [{ name: 'tools', template: 'no' }, { name: 'default', template: 'yes' }]; // prettier-ignore
  const named = { ...files, 'tokenizer_config.json': { chat_template: list } };
  expect(model({}, tensors, named).chat!.render(say)).toBe('yes');
  expect(model({}, tensors, { ...named, 'chat_template.jinja': 'own' }).chat!.render(say)).toBe('own');
  expect(model({}, tensors, files).chat).toBeUndefined();
  expect(() => model({}, tensors, { ...files, 'tokenizer_config.json': { chat_template: 7 } }).chat).toThrow(corrupt('no string'));
  expect(() => model().tokenizer).toThrow(unsupported('tokenizer.json'));
  const larger = { ...tokenizer, added_tokens: [...tokenizer.added_tokens, { id: vocabulary, content: 'x', special: false }] };
  expect(() => model({}, tensors, { 'tokenizer.json': larger }).tokenizer).toThrow(corrupt('261 tokens'));
}); // prettier-ignore

test('mutations: a KvError or a model, never anything else', () => {
  const random = new Random(21);
  const file = safetensors(tensors);
  const header = 8 + Number(new DataView(file.buffer).getBigUint64(0, true));
  const path = folder({ 'config.json': config });
  const text = JSON.stringify(config);
  const outcomes = { models: 0, errors: 0 };
  for (let round = 0; round < 1000; round++) {
    const bytes = file.slice();
    for (let count = 1 + random.below(3); count > 0; count--)
      bytes[random.below(3) === 0 ? random.below(8) : random.below(header)] = random.pick([0, 0x22, 0x2c, 0x30, 0x39, 0x5d, 0x7b, 0xff, random.below(256)]); // prettier-ignore
    writeFileSync(join(path, 'model.safetensors'), round % 4 === 0 ? bytes.subarray(0, random.below(bytes.length)) : round % 4 === 1 ? file : bytes); // prettier-ignore
    const at = random.below(text.length);
    const damaged = `${text.slice(0, at)}${random.pick(['0', '-', '9', '"', '', 'e9', 'null'])}${text.slice(at + random.below(3))}`;
    writeFileSync(join(path, 'config.json'), round % 4 === 1 ? damaged : text);
    try {
      openModel(path);
      outcomes.models++;
    } catch (error) {
      if (!(error instanceof KvError)) throw new Error(`round ${round}`, { cause: error });
      outcomes.errors++;
    }
  }
  expect(outcomes.models).toBeGreaterThan(20);
  expect(outcomes.errors).toBeGreaterThan(500);
});
