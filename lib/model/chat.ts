/** Chat templates: the Jinja programs by which models want conversations written. */
import { runInNewContext } from 'node:vm';
import { KvError, invalid } from '../errors';
import { jinjaTemplate, renderJinja, type JinjaTemplate } from './packages';
import { corrupt } from './tensors';

export interface ChatMessage {
  /** `system`, `user`, `assistant` or what else the template knows. */
  readonly role: string;
  readonly content: string;
  readonly [field: string]: unknown;
}

export interface ChatOptions {
  /** Whether the text ends where the assistant's answer begins; default true. */
  readonly addGenerationPrompt?: boolean;
  /** More variables of the template, such as `tools`. */
  readonly variables?: Readonly<Record<string, unknown>>;
}

const MAX_TEMPLATE = 1 << 20;
const MAX_RANGE = 1 << 16;
const TIME_LIMIT = 2000; // milliseconds; real templates take one

/** A template comes with the model's file and is a program: it runs with limits. */
export class ChatTemplate {
  private template: JinjaTemplate | undefined;

  /** `tokens` are variables such as `bos_token`; `path` names the file in messages. */
  constructor(
    private readonly path: string,
    readonly source: string,
    private readonly tokens: Readonly<Record<string, string>> = {},
  ) {
    if (source.length > MAX_TEMPLATE)
      throw corrupt(path, `its chat template has ${source.length} characters`);
  }

  /** The text to encode with `{ special: true, bos: false }`: templates write BOS themselves. */
  render(messages: readonly ChatMessage[], options: ChatOptions = {}): string {
    const { addGenerationPrompt = true, variables = {} } = options;
    const valid = (message: unknown) =>
      typeof message === 'object' && message !== null && typeof (message as ChatMessage).role === 'string';
    if (!Array.isArray(messages) || !messages.every(valid))
      throw invalid('The messages of a chat must be a list of objects with a role and a content.');
    const work = () => {
      this.template ??= jinjaTemplate(this.source);
      return renderJinja(this.template, {
        ...globals,
        ...this.tokens,
        ...variables,
        messages,
        add_generation_prompt: addGenerationPrompt,
      });
    };
    try {
      const text: unknown = runInNewContext('work()', { work }, { timeout: TIME_LIMIT });
      if (typeof text !== 'string') throw new Error('it gives no text');
      return text;
    } catch (cause) {
      const reason = cause instanceof Error ? cause.message : String(cause);
      throw new KvError(
        'ERR_INNERKV_INVALID_ARGUMENT',
        `The chat template of ${this.path} refuses: ${reason}.`,
        { cause },
      );
    }
  }
}

/** What templates expect to find, with a range that cannot use up the memory. */
const globals: Readonly<Record<string, unknown>> = {
  ...{ true: true, True: true, false: false, False: false, none: null, None: null },
  range: boundedRange,
  raise_exception(message: unknown) {
    throw new Error(String(message));
  },
  strftime_now: (format: string) => jinjaTemplate('{{ strftime_now(format) }}').render({ format }),
};

/** Python's range, but never more than memory can hold. */
function boundedRange(first: number, second?: number, step = 1): number[] {
  const [from, to] = second === undefined ? [0, first] : [first, second];
  const count = Math.max(0, Math.ceil((to - from) / step));
  if (!(count <= MAX_RANGE)) throw new Error(`a range of ${count} numbers`);
  return Array.from({ length: count }, (_, i) => from + i * step);
}
