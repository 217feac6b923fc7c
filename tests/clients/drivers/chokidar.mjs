// chokidar on ROOT: one JSON line for each event; with --text the file's content as the handler reads it.
import { readFileSync } from 'node:fs';
import { watch } from 'chokidar';

const [root, flag] = process.argv.slice(2);
const say = (line) => process.stdout.write(JSON.stringify(line) + '\n');
const textOf = (path) => {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return null;
  }
};

watch(root, { ignoreInitial: true, usePolling: false })
  .on('all', (event, path) => {
    const text = flag === '--text' && (event === 'add' || event === 'change') ? textOf(path) : null;
    say({ event, path, text });
  })
  .on('error', (error) => say({ event: 'error', path: String(error), text: null }))
  .on('ready', () => say({ ready: true }));
