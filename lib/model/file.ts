/** Opening a model: its configuration, where its tensors lie, its tokenizer. Weights are never read here. */
import { createHash } from 'node:crypto';
import { existsSync, statSync } from 'node:fs';
import { basename, dirname, extname, join, resolve } from 'node:path';
import { bitllamaModel, VERSIONED_MAGIC } from './bitllama';
import { Cursor, unreadable, withFile } from './bytes';
import { ChatTemplate } from './chat';
import { type ModelConfig } from './config';
import { MAGIC, parseGguf } from './gguf';
import { ggufModel } from './gguf-model';
import { huggingFaceModel, isJson, readJson, readText, type Json } from './hugging-face';
import { llama2cModel } from './llama2c';
import { corrupt, unsupported, type CanonicalName, type TensorInfo } from './tensors';
import { makeTokenizer, type Tokenizer } from './tokenizer';
import { ggufTokenizer, hubSource, llama2cTokenizer } from './vocabulary';

export type { ModelConfig } from './config';
export type { CanonicalName, LayerTensor, TensorInfo, TensorType } from './tensors';

export interface ModelFile {
  /** As the file calls itself, else the file's own name. */
  readonly name: string;
  readonly format: 'GGUF' | 'Hugging Face' | 'llama2.c';
  /** Absolute path of the file or folder. */
  readonly path: string;
  readonly config: ModelConfig;
  /** All of them have the shapes that `config` asks for. */
  readonly tensors: ReadonlyMap<CanonicalName, TensorInfo>;
  /** Made when it is first asked for, which throws if the file brings none or a broken one. */
  readonly tokenizer: Tokenizer;
  /** Undefined where the file brings no chat template. */
  readonly chat: ChatTemplate | undefined;
  /** Hexadecimal SHA-256 over the configuration and the beginning of every tensor: the same wherever the file lies. */
  readonly fingerprint: string;
}

export interface OpenModelOptions {
  /**
   * A file with the tokenizer, instead of the one that the model brings: tokenizer.json, a GGUF, or the vocabulary of
   * llama2.c. Checkpoints of llama2.c are looked up beside themselves: tok<size>.bin, tokenizer.bin.
   */
  readonly tokenizer?: string;
}

/**
 * Opens a `.gguf`, a folder with config.json and safetensors, or a llama2.c `.bin`. Throws KvError: INVALID_ARGUMENT for
 * what cannot be read, CORRUPT for damaged files, UNSUPPORTED for architectures and types that are not known here.
 */
export function openModel(path: string, options: OpenModelOptions = {}): ModelFile {
  const place = resolve(path);
  const parts = isFolder(place) ? openFolder(place) : openFile(place);
  const { tokenizer } = options;
  return new OpenedModel(
    place,
    tokenizer === undefined
      ? parts
      : { ...parts, tokenizer: () => tokenizerFile(resolve(tokenizer), parts.config.vocabulary) },
  );
}

interface Parts {
  readonly format: ModelFile['format'];
  readonly name: string;
  readonly config: ModelConfig;
  readonly tensors: ReadonlyMap<CanonicalName, TensorInfo>;
  tokenizer(): Tokenizer;
  chatTemplate(): unknown;
}

class OpenedModel implements ModelFile {
  readonly name: string;
  readonly format: ModelFile['format'];
  readonly config: ModelConfig;
  readonly tensors: ReadonlyMap<CanonicalName, TensorInfo>;
  private readonly made: { tokenizer?: Tokenizer; chat?: ChatTemplate | undefined; fingerprint?: string } =
    {};

  constructor(
    readonly path: string,
    private readonly parts: Parts,
  ) {
    this.name = parts.name.replace(/\p{C}/gu, '').slice(0, 200) || basename(path);
    this.format = parts.format;
    this.config = parts.config;
    this.tensors = parts.tensors;
  }

  get tokenizer(): Tokenizer {
    if (!this.made.tokenizer) {
      const tokenizer = this.parts.tokenizer();
      if (tokenizer.size > this.config.vocabulary)
        throw corrupt(
          this.path,
          `its tokenizer has ${tokenizer.size} tokens, its embedding ${this.config.vocabulary}`,
        );
      this.made.tokenizer = tokenizer;
    }
    return this.made.tokenizer;
  }

  get chat(): ChatTemplate | undefined {
    if (!('chat' in this.made)) {
      const source = this.parts.chatTemplate();
      const token = (id: number | undefined) => (id === undefined ? '' : (this.tokenizer.token(id) ?? ''));
      if (source !== undefined && typeof source !== 'string')
        throw corrupt(this.path, 'its chat template is no string');
      this.made.chat =
        source === undefined
          ? undefined
          : new ChatTemplate(this.path, source, {
              bos_token: token(this.tokenizer.bos),
              eos_token: token(this.config.eos[0]),
            });
    }
    return this.made.chat;
  }

  get fingerprint(): string {
    return (this.made.fingerprint ??= fingerprint(this.config, this.tensors));
  }
}

const SAMPLE = 4096;

/** Of a model's parts; see ModelFile.fingerprint. */
export function fingerprint(config: ModelConfig, tensors: ReadonlyMap<CanonicalName, TensorInfo>): string {
  const hash = createHash('sha256');
  hash.update(JSON.stringify(config, (_, value: unknown) => (ArrayBuffer.isView(value) ? [value] : value)));
  const samples = new Map<CanonicalName, Uint8Array>();
  for (const path of new Set([...tensors.values()].map((tensor) => tensor.path)))
    withFile(path, (source) => {
      for (const [name, { path: home, offset, bytes }] of tensors)
        if (home === path) samples.set(name, source.read(offset, Math.min(SAMPLE, bytes)));
    });
  for (const name of [...tensors.keys()].sort()) {
    const { type, shape, scale } = tensors.get(name)!;
    hash.update(JSON.stringify([name, type, shape, ...(scale === undefined ? [] : [scale])]));
    hash.update(samples.get(name)!);
  }
  return hash.digest('hex');
}

function isFolder(path: string): boolean {
  try {
    return statSync(path).isDirectory();
  } catch (cause) {
    throw unreadable(path, cause);
  }
}

function openFile(path: string): Parts {
  return withFile(path, (source): Parts => {
    const magic = source.size < 4 ? undefined : new Cursor(source).u32();
    if (magic === MAGIC || extname(path) === '.gguf') {
      const gguf = parseGguf(source);
      const name = gguf.metadata.get('general.name');
      return {
        format: 'GGUF',
        name: typeof name === 'string' ? name : basename(path),
        ...ggufModel(gguf, source),
        tokenizer: () => ggufTokenizer(gguf),
        chatTemplate: () => gguf.metadata.get('tokenizer.chat_template'),
      };
    }
    if (extname(path) !== '.bin')
      throw unsupported(
        path,
        'a model is a .gguf, a folder with config.json and safetensors, or a llama2.c .bin',
      );
    const model = magic === VERSIONED_MAGIC ? bitllamaModel(source) : llama2cModel(source);
    return {
      format: 'llama2.c',
      name: basename(path),
      ...model,
      tokenizer: () => tokenizerFile(besideCheckpoint(path, model.config), model.config.vocabulary),
      chatTemplate: () => undefined,
    };
  });
}

function besideCheckpoint(path: string, { vocabulary }: ModelConfig): string {
  const names = [`tok${vocabulary}.bin`, 'tokenizer.bin'];
  const found = names.map((name) => join(dirname(path), name)).find((file) => existsSync(file));
  if (found === undefined) throw unsupported(path, `it has no tokenizer beside it (${names.join(' or ')})`);
  return found;
}

function openFolder(folder: string): Parts {
  return {
    format: 'Hugging Face',
    name: basename(folder),
    ...huggingFaceModel(folder),
    tokenizer: () => folderTokenizer(join(folder, 'tokenizer.json')),
    chatTemplate: () => folderTemplate(folder),
  };
}

function folderTokenizer(path: string): Tokenizer {
  const json = readJson(path);
  if (!json) throw unsupported(path, 'there is no such file, and other forms of tokenizers are not known');
  return makeTokenizer(hubSource(path, json, readJson(join(dirname(path), 'tokenizer_config.json')) ?? {}));
}

/** A string, or the one called `default` among named ones; in newer folders a file of its own. */
function folderTemplate(folder: string): unknown {
  const own = readText(join(folder, 'chat_template.jinja'));
  if (own !== undefined) return own;
  const template = readJson(join(folder, 'tokenizer_config.json'))?.chat_template ?? undefined;
  if (!Array.isArray(template)) return template;
  const named = template.find((one): one is Json => isJson(one) && one.name === 'default');
  return named?.template;
}

function tokenizerFile(path: string, size: number): Tokenizer {
  if (extname(path) === '.json') return folderTokenizer(path);
  return withFile(path, (source) =>
    extname(path) === '.gguf'
      ? ggufTokenizer(parseGguf(source))
      : llama2cTokenizer(path, size, new Cursor(source)),
  );
}
