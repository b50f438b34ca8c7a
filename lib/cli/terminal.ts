/** Output for people: aligned tables, progress, units. Everything else a command prints is JSON. */
import { styleText } from 'node:util';

export interface Column {
  readonly title: string;
  /** Text is aligned to the left, numbers (the default) to the right. */
  readonly text?: boolean;
}

function colours(stream: NodeJS.WriteStream): boolean {
  const { NO_COLOR, TERM } = process.env;
  return stream.isTTY && !NO_COLOR && TERM !== 'dumb';
}

export function bold(text: string): string {
  return colours(process.stdout) ? styleText('bold', text) : text;
}

export function dim(text: string): string {
  return colours(process.stdout) ? styleText('dim', text) : text;
}

/** Rows under a header, columns two spaces apart. */
export function table(columns: readonly Column[], rows: readonly (readonly string[])[]): string {
  const widths = columns.map(({ title }, i) => Math.max(title.length, ...rows.map((row) => row[i]!.length)));
  const line = (cells: readonly string[]) =>
    cells
      .map((cell, i) => (columns[i]!.text ? cell.padEnd(widths[i]!) : cell.padStart(widths[i]!)))
      .join('  ')
      .trimEnd();
  return [bold(line(columns.map(({ title }) => title))), ...rows.map(line)].join('\n');
}

/** "name  value" lines. */
export function pairs(entries: readonly (readonly [string, string])[]): string {
  const width = Math.max(...entries.map(([name]) => name.length));
  return entries.map(([name, value]) => `${bold(name.padEnd(width))}  ${value}`).join('\n');
}

export function bytes(count: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];
  const power = count < 1 ? 0 : Math.min(units.length - 1, Math.floor(Math.log2(count) / 10));
  const value = count / 1024 ** power;
  return `${power === 0 ? value : value.toPrecision(value < 1000 ? 3 : 4)} ${units[power]!}`;
}

/** A bar on stderr, drawn only where a person can see it move. */
export class Progress {
  private readonly shown = process.stderr.isTTY && process.env.TERM !== 'dumb';
  private last = -Infinity;

  /** `fraction` of everything, 0 … 1. */
  update(fraction: number, label: string): void {
    const now = performance.now();
    if (!this.shown || (now - this.last < 50 && fraction < 1)) return;
    this.last = now;
    const full = Math.round(24 * Math.min(1, Math.max(0, fraction)));
    const bar = `${'#'.repeat(full)}${'.'.repeat(24 - full)}`;
    process.stderr.write(`\r\x1b[K[${bar}] ${String(Math.round(100 * fraction)).padStart(3)} % ${label}`);
  }

  /** Takes the bar away. */
  clear(): void {
    if (this.shown) process.stderr.write('\r\x1b[K');
  }
}
