/**
 * The two Hugging Face packages, loaded when they are first needed. They declare themselves as ECMAScript modules
 * although they carry CommonJS builds, so the parts used here are typed by hand.
 */
import { createRequire } from 'node:module';

const load = createRequire(__filename);

/** `Tokenizer` of @huggingface/tokenizers: made of a tokenizer.json and a tokenizer_config.json. */
export interface HubTokenizer {
  encode(
    text: string,
    options: { readonly add_special_tokens: boolean },
  ): { readonly ids: readonly (number | undefined)[] };
}

export function hubTokenizer(json: object): HubTokenizer {
  const { Tokenizer } = load('@huggingface/tokenizers') as {
    Tokenizer: new (json: object, config: object) => HubTokenizer;
  };
  return new Tokenizer(json, {});
}

/** A parsed template of @huggingface/jinja. */
export interface JinjaTemplate {
  readonly parsed: unknown;
  render(variables: Readonly<Record<string, unknown>>): string;
}

interface Jinja {
  readonly Template: new (source: string) => JinjaTemplate;
  readonly Environment: new () => { set(name: string, value: unknown): unknown };
  readonly Interpreter: new (environment: object) => { run(program: unknown): { readonly value: unknown } };
}

export function jinjaTemplate(source: string): JinjaTemplate {
  const { Template } = load('@huggingface/jinja') as Jinja;
  return new Template(source);
}

/** Renders with these variables and nothing else: the package's own globals cannot be replaced in its `render`. */
export function renderJinja(template: JinjaTemplate, variables: Readonly<Record<string, unknown>>): unknown {
  const { Environment, Interpreter } = load('@huggingface/jinja') as Jinja;
  const environment = new Environment();
  for (const [name, value] of Object.entries(variables)) environment.set(name, value);
  return new Interpreter(environment).run(template.parsed).value;
}
