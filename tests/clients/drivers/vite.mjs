// Vite's dev server on ROOT (its cache in CACHE) and a stand-in for the browser: it loads the URLs, listens on
// the HMR socket and, as a page would, fetches what Vite says has changed. One JSON line for each HMR message.
import { createServer } from 'vite';
import WebSocket from 'ws';

const [root, cacheDir, ...urls] = process.argv.slice(2);
const say = (line) => process.stdout.write(JSON.stringify(line) + '\n');

const server = await createServer({
  root,
  cacheDir,
  configFile: false,
  clearScreen: false,
  optimizeDeps: { noDiscovery: true },
  server: { host: '127.0.0.1', port: 0, watch: { usePolling: false } },
});
await server.listen();
const address = `127.0.0.1:${server.httpServer.address().port}`;

let page = '';
const load = async (url) => {
  const linked = page.includes(`href="${url.split('?')[0]}"`); // a style sheet, as it is
  const accept = url.endsWith('.html') ? 'text/html' : linked ? 'text/css' : '*/*';
  const reply = await fetch(`http://${address}${url}`, { headers: { accept } });
  return reply.ok ? await reply.text() : null;
};
const loadPage = async () => {
  page = await load('/index.html');
  for (const url of urls) await load(url);
};
const relative = (path) => (path.startsWith(root) ? path.slice(root.length) : path).replace(/^\//, '');

await loadPage();
const socket = new WebSocket(`ws://${address}/`, 'vite-hmr');
socket.on('message', async (data) => {
  const message = JSON.parse(data);
  if (message.type === 'connected') say({ ready: true });
  for (const { type, path, timestamp } of message.updates ?? [])
    say({ event: type, path: relative(path), text: await load(`${path}${path.includes('?') ? '&' : '?'}t=${timestamp}`) });
  if (message.type === 'full-reload') {
    await loadPage();
    say({ event: 'full-reload', path: relative(message.triggeredBy ?? message.path ?? '*'), text: null });
  }
  if (message.type === 'error') say({ event: 'error', path: message.err.message, text: null });
});
