/** What generation starts from: texts, tokens and conversations, as tokens. */
import { invalid, KvError } from '../errors';
import { type ChatMessage } from './chat';
import { type ModelWeights, type Tokens } from './runner';
import { type Tokenizer } from './tokenizer';

/** A text, its tokens, or a conversation for the model's chat template. */
export type Prompt = string | Tokens | readonly ChatMessage[];

export function isConversation(prompt: Prompt): prompt is readonly ChatMessage[] {
  return Array.isArray(prompt) && typeof prompt[0] === 'object';
}

/** Tokens can be generated without a tokenizer, texts cannot. */
export function tokenizerOf(file: ModelWeights, needed: boolean): Tokenizer | undefined {
  try {
    const { tokenizer } = file;
    if (tokenizer || !needed) return tokenizer;
  } catch (error) {
    if (needed || !(error instanceof KvError)) throw error;
    return undefined;
  }
  throw new KvError('ERR_INNERKV_UNSUPPORTED', 'This model was opened without a tokenizer; give it tokens.');
}

/** `continues`: other tokens stand before it, so that no BOS does. */
export function tokensOf(
  file: ModelWeights,
  tokenizer: Tokenizer | undefined,
  prompt: Prompt,
  continues: boolean,
): number[] {
  if (typeof prompt === 'string') return [...tokenizer!.encode(prompt, continues ? { bos: false } : {})];
  if (isConversation(prompt)) {
    if (!file.chat)
      throw new KvError('ERR_INNERKV_UNSUPPORTED', 'This model brings no chat template; give it a text.');
    return [...tokenizer!.encode(file.chat.render(prompt), { special: true, bos: false })];
  }
  if (!Array.isArray(prompt) && !ArrayBuffer.isView(prompt))
    throw invalid('A prompt must be a text, an array of tokens, or a list of chat messages.');
  return Array.from(prompt as ArrayLike<number>);
}
