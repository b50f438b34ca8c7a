/** What a command is, and how its options are read: strictly, from one table that also writes the help. */
import { parseArgs } from 'node:util';

export interface Option {
  /** Name of the value in the help; without it the option is a switch. */
  readonly value?: string;
  readonly help: string;
  readonly default?: string;
  /** May be given several times. */
  readonly many?: boolean;
  /** One letter that stands for the name. */
  readonly short?: string;
}

/** What was given on the command line, defaults filled in. */
export type Values = Readonly<Record<string, string | boolean | readonly string[] | undefined>>;

export interface Command {
  readonly name: string;
  readonly summary: string;
  readonly options: Readonly<Record<string, Option>>;
  /** Name of the one argument that is no option, in capitals; its value has this name too. */
  readonly operand?: string;
  /** More paragraphs for the help. */
  readonly notes?: string;
  /** Resolves to the exit code. */
  run(values: Values): Promise<number> | number;
}

export const EXIT = { ok: 0, failed: 1, usage: 2 } as const;

/** A command line that cannot be understood. */
export class UsageError extends Error {
  override readonly name = 'UsageError';
}

const COMMON: Readonly<Record<string, Option>> = {
  json: { help: 'print one JSON object' },
  help: { help: 'show this help' },
};

function allOptions(command: Command): Readonly<Record<string, Option>> {
  return { ...command.options, ...COMMON };
}

export function parseOptions(command: Command, args: readonly string[]): Values {
  const options = Object.fromEntries(
    Object.entries(allOptions(command)).map(([name, { value, many = false, short }]) => [
      name,
      {
        type: value === undefined ? ('boolean' as const) : ('string' as const),
        multiple: many,
        ...(short !== undefined && { short }),
      },
    ]),
  );
  const { operand } = command;
  let given: Record<string, unknown>;
  let operands: readonly string[];
  try {
    ({ values: given, positionals: operands } = parseArgs({
      args: [...args],
      options,
      strict: true,
      allowPositionals: operand !== undefined,
    }));
  } catch (error) {
    throw new UsageError(error instanceof Error ? error.message.split('. ')[0] : String(error), {
      cause: error,
    });
  }
  if (operand !== undefined && !given.help) {
    if (operands.length !== 1 || operands[0] === '')
      throw new UsageError(`${operand} must be given once, not ${operands.length} times`);
    given[operand] = operands[0];
  }
  const defaults = Object.entries(allOptions(command)).map(
    ([name, option]) => [name, option.default] as const,
  );
  return { ...Object.fromEntries(defaults), ...given } as Values;
}

export function text(values: Values, name: string): string | undefined {
  const value = values[name];
  if (value === '') throw new UsageError(`--${name} needs a value`);
  return typeof value === 'string' ? value : undefined;
}

/** The value of an option that a command cannot do without. */
export function required(values: Values, name: string): string {
  const value = text(values, name);
  if (value === undefined) throw new UsageError(`--${name} is missing`);
  return value;
}

/** All values of an option that may be given several times. */
export function texts(values: Values, name: string): readonly string[] {
  const value = values[name];
  return Array.isArray(value) ? (value as readonly string[]) : [];
}

/** A number from `low` to `high`; undefined where the option is absent. */
export function number(values: Values, name: string, low: number, high: number): number | undefined {
  const given = text(values, name);
  if (given === undefined) return undefined;
  const value = /^-?\d+(\.\d*)?$|^-?\.\d+$/.test(given) ? Number(given) : NaN;
  if (!(value >= low && value <= high))
    throw new UsageError(`--${name} must be a number from ${low} to ${high}, not "${given}"`);
  return value;
}

/** A whole number of at least 1, with an optional suffix K, M or G (1024, 1024², 1024³). */
export function count(values: Values, name: string): number {
  const [, digits, suffix] = /^(\d{1,15})([kmg]?)$/i.exec(text(values, name) ?? '') ?? [];
  const number = Number(digits) * 1024 ** ['', 'k', 'm', 'g'].indexOf((suffix ?? '').toLowerCase());
  if (!Number.isSafeInteger(number) || number < 1)
    throw new UsageError(`--${name} must be a whole number of at least 1, not "${text(values, name) ?? ''}"`);
  return number;
}

/** Names between commas. */
export function list(values: Values, name: string): string[] | undefined {
  const names = text(values, name)?.split(',').map((part) => part.trim()); // prettier-ignore
  if (names?.includes('')) throw new UsageError(`--${name} must be names between commas`);
  return names;
}

/** `program`: as typed before the command. */
export function helpOf(command: Command, program: string): string {
  const left = ([name, { value, short }]: [string, Option]) =>
    `${short === undefined ? '' : `-${short}, `}--${name}${value === undefined ? '' : ` ${value}`}`;
  const entries = Object.entries(allOptions(command));
  const width = Math.max(...entries.map((entry) => left(entry).length));
  const lines = entries.map((entry) => {
    const usual = entry[1].default === undefined ? '' : ` (${entry[1].default})`;
    return `  ${left(entry).padEnd(width)}  ${entry[1].help}${usual}`;
  });
  const notes = command.notes === undefined ? '' : `\n\n${command.notes}`;
  const operand = command.operand === undefined ? '' : ` ${command.operand}`;
  return `${program} ${command.name}${operand}: ${command.summary}\n\n${lines.join('\n')}${notes}`;
}
